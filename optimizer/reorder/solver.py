"""The solver: row order and field orders of a coded table, with as long common prefixes as it finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.dependencies import with_followers
from spark_llm.optimizer.reorder.expected import Sample
from spark_llm.optimizer.reorder.fixed import best_fixed_order
from spark_llm.optimizer.reorder.groups import Taking, fixed_order, group_orders
from spark_llm.optimizer.reorder.small import MAX_CELLS, small_orders

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# The fewer cells a table has, the more is tried.
_MORE_BELOW_CELLS, _MOST_BELOW_CELLS = 500_000, 50_000
_CLIMB_ROWS, _CLIMB_BUDGET = 4_000, 80


class Solution(NamedTuple):
    """``rows``: int64 [rows], the rows in their order; ``orders``: int64 [rows, fields], the field order of each row of
    the table (not of the schedule)."""

    rows: Ints
    orders: Ints


def solve_cells(cells: Ints, lengths: Floats) -> Solution:
    """The best schedule found. ``cells`` as for ``group_orders``; ``lengths`` [cell numbers]: the length of each.

    Of what was tried, small tables take the greatest prefix hit count (squared lengths), others the greatest product
    of hit count and hit rate (lengths): the one is the objective as published, the other what a cache saves.
    """
    weights = lengths * lengths
    best, most = None, -1.0
    is_small = cells.size <= MAX_CELLS
    for orders in _candidates(cells, lengths, weights):
        found = Solution(prefix_rows(cells, orders), orders)
        hits, saved = hits_of(cells, (weights, lengths), found)
        worth = hits if is_small else hits * saved
        if worth > most:
            best, most = found, worth
    assert best is not None
    return best


def _candidates(cells: Ints, lengths: Floats, weights: Floats) -> Iterator[Ints]:
    tail = fixed_order(cells, weights)
    yield np.broadcast_to(tail, cells.shape)
    if cells.size <= MAX_CELLS:
        yield from small_orders(cells, weights, tail)
    if not cells.size:
        return
    heavier, longer = with_followers(cells, weights, lengths)
    yield group_orders(cells, heavier, Taking(), tail)
    if cells.size < _MORE_BELOW_CELLS:
        yield group_orders(cells, longer, Taking(), tail)
        yield np.broadcast_to(_climbed(cells, lengths), cells.shape)
    if cells.size < _MOST_BELOW_CELLS:
        for damping in (0.0, 0.4, 0.8, 1.0):
            yield group_orders(cells, weights, Taking(damping), tail)
            yield group_orders(cells, heavier, Taking(damping), tail)


def _climbed(cells: Ints, lengths: Floats) -> Ints:
    """The best single order, by some of the rows."""
    rows = len(cells)
    some = cells[:: max(rows // _CLIMB_ROWS, 1)]
    sample = Sample(some, lengths[some], rows)
    by_length = np.argsort(-sample.lengths.mean(axis=0), kind="stable")
    return best_fixed_order(sample, (by_length,), _CLIMB_BUDGET)


def prefix_rows(cells: Ints, orders: Ints) -> Ints:
    """The rows in lexicographic order of their cells, each in its field order, which may leave fields out. Equal rows
    keep theirs."""
    if not orders.shape[1]:
        return np.arange(len(cells))
    return np.lexsort(np.take_along_axis(cells, orders, axis=1).T[::-1])


def hits_of(cells: Ints, weights: Sequence[Floats], solution: Solution) -> list[float]:
    """The summed weights of all cells that are in a prefix which the row shares with the one before it, by each of
    ``weights``, float64 [cell numbers]."""
    ordered = np.take_along_axis(cells, solution.orders, axis=1)[solution.rows]
    found = [0.0] * len(weights)
    shared = np.arange(1, len(ordered))
    for position in range(cells.shape[1]):
        hit = ordered[shared, position]
        is_equal = hit == ordered[shared - 1, position]
        shared, hit = shared[is_equal], hit[is_equal]
        if not len(hit):
            break
        found = [sum_ + float(weight[hit].sum()) for sum_, weight in zip(found, weights, strict=True)]
    return found
