"""GGR, the greedy group recursion of Liu et al., as published. For comparison only: ``solver`` does not use it.

arXiv 2403.05821, algorithm 1 and the settings of its evaluation: lengths in characters, dependencies declared by hand,
recursion ended early, and one field order by statistics for what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.groups import fixed_order
from spark_llm.optimizer.reorder.solver import Solution, prefix_rows

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def ggr_cells(
    cells: Ints,
    lengths: Floats,
    *,
    dependencies: Sequence[Sequence[int]] = (),
    row_depth: int | None = 4,
    column_depth: int | None = 2,
    stop_below: float = 100_000,
    last_above: float = 0.7,
) -> Solution:
    """GGR's schedule of a coded table; ``cells`` and ``lengths`` as for ``solve_cells``, lengths in characters.

    ``dependencies``: sets of fields that determine each other. ``row_depth``: after that many groups the other rows
    fall back to one field order, ``column_depth``: after that many groups inside groups; ``stop_below``: no group
    of fewer squared characters is made; ``last_above``: fields with a greater share of distinct values stand last.
    None, None, 0 and 1 switch the stops off.
    """
    rows, fields = cells.shape
    weights = lengths * lengths
    share = [len(np.unique(cells[:, field])) / max(rows, 1) for field in range(fields)]
    last = [field for field in range(fields) if share[field] > last_above]
    first = [field for field in range(fields) if field not in last]
    follows = {
        field: [other for group in dependencies if field in group for other in group if other != field]
        for field in range(fields)
    }
    search = _Greedy(cells, weights, follows, row_depth, column_depth, stop_below)
    search.solve(np.arange(rows), first, [], 0, 0)
    orders = np.empty((rows, fields), np.int64)
    for part, order in search.parts:
        orders[part] = order + last
    return Solution(np.concatenate([part for part, _ in search.parts]) if search.parts else np.arange(0), orders)


class _Greedy:
    def __init__(
        self,
        cells: Ints,
        weights: Floats,
        follows: dict[int, list[int]],
        row_depth: int | None,
        column_depth: int | None,
        stop_below: float,
    ) -> None:
        self.cells, self.weights, self.follows = cells, weights, follows
        self.row_depth, self.column_depth, self.stop_below = row_depth, column_depth, stop_below
        self.parts: list[tuple[Ints, list[int]]] = []  # rows in their order, and their fields

    def solve(self, rows: Ints, fields: list[int], head: list[int], depth: int, columns: int) -> None:
        """Order ``rows``, whose cells of ``head`` are equal, by the other ``fields``."""
        while len(rows):
            stopped = self.row_depth is not None and depth >= self.row_depth
            stopped |= self.column_depth is not None and columns >= self.column_depth
            best = None if stopped or len(rows) == 1 or not fields else self.best_group(rows, fields)
            if best is None:
                self.fall_back(rows, fields, head)
                return
            field, cell = best
            led = [field] + [other for other in self.follows[field] if other in fields]
            held = self.cells[rows, field] == cell
            self.solve(rows[held], [f for f in fields if f not in led], head + led, depth, columns + 1)
            rows = rows[~held]
            depth += 1

    def best_group(self, rows: Ints, fields: list[int]) -> tuple[int, int] | None:
        """The field and the cell of the group of the greatest hit count; None where that is too small."""
        most, best = max(self.stop_below, 0.0), None
        for field in fields:
            column = self.cells[rows, field]
            low = int(column.min())
            count = np.bincount(column - low)
            weight = self.weights[low : low + len(count)].copy()
            for other in self.follows[field]:
                if other in fields:  # the mean over the group's rows
                    summed = np.bincount(column - low, weights=self.weights[self.cells[rows, other]])
                    weight += summed / np.maximum(count, 1)
            hits = weight * (count - 1)
            top = int(hits.argmax())
            if hits[top] > most or (hits[top] == most and most > 0 and best is None):
                most, best = float(hits[top]), (field, low + top)
        return best

    def fall_back(self, rows: Ints, fields: list[int], head: list[int]) -> None:
        part = self.cells[np.ix_(rows, np.array(fields, np.int64))]
        by_statistics = [fields[number] for number in fixed_order(part, self.weights)]
        order = np.tile(np.array(by_statistics, np.int64), (len(rows), 1))
        self.parts.append((rows[prefix_rows(self.cells[rows], order)], head + by_statistics))
