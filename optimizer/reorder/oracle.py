"""OPHR: the exact recursion for the best prefix order of a small table. For tests; the solver never asks it.

Liu et al., arXiv 2403.05821, section 3: take a column and a value, put the rows that have it together with that cell
in front, and solve both parts. Exponential: made for tables of about 8 rows and 4 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from spark_llm.optimizer.reorder.measure import Lengths, Render, Schedule, cell_lengths

MAX_ROWS = 12
MAX_FIELDS = 8


class Optimum(NamedTuple):
    """``phc``: the greatest prefix hit count, sum of squared lengths; ``schedule``: rows that have it."""

    phc: float
    schedule: Schedule


class _Best(NamedTuple):
    phc: float
    column: int
    group: int  # bit mask of rows


def ophr(
    rows: Sequence[Sequence[tuple[str, Any]]], *, lengths: Lengths | None = None, render: Render | None = None
) -> Optimum:
    """The best schedule of ``rows``, which all have the same fields in the same order.

    ``lengths`` and ``render`` are those of ``solve``. Raises ValueError on tables of more than 12 rows or 8 fields.
    """
    columns = len(rows[0]) if rows else 0
    if len(rows) > MAX_ROWS or columns > MAX_FIELDS:
        raise ValueError(f"the oracle is for at most {MAX_ROWS} rows and {MAX_FIELDS} fields")
    weights, groups = [], []
    for column in range(columns):
        cells = cell_lengths([row[column] for row in rows], lengths, render)
        weights.append([length * length for _, length in cells])
        masks: dict[Any, int] = {}
        for number, (key, _) in enumerate(cells):
            masks[key] = masks.get(key, 0) | 1 << number
        groups.append(list(masks.values()))
    best = _search(weights, groups, (1 << len(rows)) - 1, (1 << columns) - 1, {})
    return Optimum(best[0].phc, _schedule(rows, best[1], (1 << len(rows)) - 1, (1 << columns) - 1))


_Memo = dict[tuple[int, int], _Best]


def _search(
    weights: list[list[float]], groups: list[list[int]], rows: int, columns: int, memo: _Memo
) -> tuple[_Best, _Memo]:
    def best(rows: int, columns: int) -> _Best:
        """The optimum of a part: a set of rows and the columns that are left, as bit masks."""
        if not rows & (rows - 1) or not columns:
            return _Best(0.0, -1, 0)
        known = memo.get((rows, columns))
        if known is not None:
            return known
        found = _Best(0.0, -1, 0)
        for column, masks in enumerate(groups):
            if not columns >> column & 1:
                continue
            for mask in masks:
                group = mask & rows
                if not group & (group - 1):  # a row alone gains nothing
                    continue
                gain = weights[column][group.bit_length() - 1] * (group.bit_count() - 1)
                inner = best(group, columns & ~(1 << column)).phc
                total = gain + inner + best(rows & ~group, columns).phc
                if total > found.phc:
                    found = _Best(total, column, group)
        memo[rows, columns] = found
        return found

    return best(rows, columns), memo


def _schedule(rows: Sequence[Sequence[tuple[str, Any]]], memo: _Memo, part: int, columns: int) -> Schedule:
    """The rows of a part in the order that its optimum came from, each with the cells that are left."""
    found = memo.get((part, columns))
    if found is None or found.column < 0:
        left = [column for column in range(columns.bit_length()) if columns >> column & 1]
        return [[rows[number][column] for column in left] for number in range(part.bit_length()) if part >> number & 1]
    column, group = found.column, found.group
    led = rows[group.bit_length() - 1][column]
    inner = [[led, *rest] for rest in _schedule(rows, memo, group, columns & ~(1 << column))]
    return inner + _schedule(rows, memo, part & ~group, columns)
