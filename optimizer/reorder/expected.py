"""What an order of fields will share in a whole table of which only a sample of rows is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def distinct_in(counts: Ints, total_rows: int) -> float:
    """How many distinct values ``total_rows`` rows have, of which a random sample has these ``counts`` of each value.

    Chao1's estimate of what the sample missed, ``f1² / 2 f2`` from the values seen once and twice, reached as the
    sample grows to ``total_rows`` (Chao et al., Rarefaction and extrapolation with Hill numbers, 2014, equation 9).
    """
    rows = int(counts.sum())
    seen = len(counts)
    once, twice = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    if total_rows <= rows or not once:
        return float(seen)
    unseen = once * once / (2 * twice) if twice else once * (once - 1) / 2
    if not unseen:
        return float(seen)
    grown = unseen * -np.expm1((total_rows - rows) * np.log1p(-once / (rows * unseen + once)))
    return float(min(seen + grown, total_rows))


@dataclass(frozen=True)
class Sample:
    """Sampled rows of a table.

    ``cells``: int64 [rows, fields], equal where a field's values are, never the same in two fields; ``lengths``:
    float64 [rows, fields]; ``total_rows``: how many rows the table has.
    """

    cells: Ints
    lengths: Floats
    total_rows: int
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", max(float(self.lengths.sum()), 1e-300))

    def hits(self, orders: Ints) -> float:
        """The expected share of field tokens of the whole table that a prefix cache finds, 0 to 1, whole cells.

        ``orders``: int64 [rows, fields] or [fields]. A prefix is computed once, by the first row that has it.
        """
        rows, fields = self.cells.shape
        prefix, missed = np.zeros(rows, np.int64), 0.0
        for position in range(fields):
            at = orders[position] if orders.ndim == 1 else orders[:, position]
            cell, length = self.cells[np.arange(rows), at], self.lengths[np.arange(rows), at]
            prefix, share, misses = self.extend(prefix, cell, length)
            missed += misses
            if share >= 1.0:
                rest = orders[position + 1 :] if orders.ndim == 1 else orders[:, position + 1 :]
                whole = self.lengths[:, rest] if orders.ndim == 1 else np.take_along_axis(self.lengths, rest, 1)
                missed += float(whole.sum())
                break
        return 1 - missed / self.total

    def extend(self, prefix: Ints, cell: Ints, length: Floats) -> tuple[Ints, float, float]:
        """Make prefixes longer by a cell: their new numbers, how many distinct ones there are by row of the table, and
        the length of the cells that no earlier row computed, in sampled rows."""
        rows = len(cell)
        number, first, counts = numbered(prefix * (int(cell.max(initial=0)) + 1) + cell)
        distinct = distinct_in(counts, self.total_rows)
        seen = float(length[first].sum())
        once = first[counts == 1]
        unseen = (distinct - len(first)) * float(length[once].mean()) if len(once) and distinct > len(first) else 0.0
        misses = min((seen + unseen) * rows / self.total_rows, float(length.sum()))
        return number, distinct / self.total_rows, misses


def numbered(keys: npt.NDArray[np.integer]) -> tuple[Ints, Ints, Ints]:
    """For each key its number among the distinct keys, and for each of those its first place and its count."""
    by = np.argsort(keys, kind="stable")
    ordered = keys[by]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))[: len(keys)]
    counts = np.diff(np.append(starts, len(keys)))
    number = np.empty(len(keys), np.int64)
    number[by] = np.repeat(np.arange(len(starts)), counts)
    return number, by[starts], counts


def best_fixed_order(sample: Sample, statistics: Ints, tries: int = 12) -> Ints:
    """One order for all rows, int64 [fields]: at each place the field that finds most for the prefixes it adds.

    ``statistics``: the fields in an order by their statistics alone; the first ``tries`` that are left are weighed at
    each place, and once hardly any prefix repeats the others follow in that order.
    """
    rows = len(sample.cells)
    left = statistics.tolist()
    order: list[int] = []
    prefix, share = np.zeros(rows, np.int64), 1 / sample.total_rows
    while left and share < 0.98 and rows:
        best = None
        for number in left[:tries]:
            cell, length = sample.cells[:, number], sample.lengths[:, number]
            longer, distinct, misses = sample.extend(prefix, cell, length)
            # A field that the prefix determines adds no prefix: it comes at once.
            worth = (float(length.sum()) - misses) / max(distinct - share, 1e-9)
            if best is None or worth > best[0]:
                best = (worth, number, longer, distinct)
        assert best is not None
        _, number, prefix, share = best
        order.append(number)
        left.remove(number)
    return np.array(order + left, np.int64)
