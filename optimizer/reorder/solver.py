"""The solver: row order and field orders of a coded table, with as long common prefixes as it finds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.groups import fixed_order, group_orders
from spark_llm.optimizer.reorder.small import MAX_CELLS, small_orders

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Which groups to take first depends on the table: large ones (0) or heavy ones (1). Small tables try more.
_DAMPINGS = (0.4, 0.8, 0.0)
_MORE_DAMPINGS = (0.4, 0.8, 0.0, 0.2, 0.6, 1.0)
_MORE_BELOW_CELLS = 50_000


class Solution(NamedTuple):
    """``rows``: int64 [rows], the rows in their order; ``orders``: int64 [rows, fields], the field order of each row of
    the table (not of the schedule)."""

    rows: Ints
    orders: Ints


def solve_cells(cells: Ints, lengths: Floats) -> Solution:
    """The best schedule found. ``cells`` as for ``group_orders``; ``lengths`` [cell ids]: the length of each."""
    rows, fields = cells.shape
    weights = lengths * lengths
    tail = fixed_order(cells, weights)
    candidates = [np.broadcast_to(tail, cells.shape)]
    if rows * fields <= MAX_CELLS:
        candidates += small_orders(cells, weights, tail)
    for damping in _MORE_DAMPINGS if rows * fields < _MORE_BELOW_CELLS else _DAMPINGS:
        candidates.append(group_orders(cells, weights, damping, tail))
    best, most = None, -1.0
    for orders in candidates:
        found = Solution(prefix_rows(cells, orders), orders)
        hits = phc_of(cells, weights, found)
        if hits > most:
            best, most = found, hits
    assert best is not None
    return best


def prefix_rows(cells: Ints, orders: Ints) -> Ints:
    """The rows in lexicographic order of their cells, each in its field order, which may leave fields out. Equal rows
    keep theirs."""
    if not orders.shape[1]:
        return np.arange(len(cells))
    return np.lexsort(np.take_along_axis(cells, orders, axis=1).T[::-1])


def phc_of(cells: Ints, weights: Floats, solution: Solution) -> float:
    """The summed weights of all cells that are in a prefix which the row shares with the one before it."""
    ordered = np.take_along_axis(cells, solution.orders, axis=1)[solution.rows]
    hits = 0.0
    shared = np.arange(1, len(ordered))
    for position in range(cells.shape[1]):
        shared = shared[ordered[shared, position] == ordered[shared - 1, position]]
        hits += float(weights[ordered[shared, position]].sum())
    return hits
