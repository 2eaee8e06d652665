"""What an order of fields will share in a whole table of which only a sample of rows is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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

    def part(self, rows: Ints) -> Sample:
        """These rows, as a sample of their like in the whole table."""
        total = round(self.total_rows * len(rows) / len(self.cells))
        return Sample(self.cells[rows], self.lengths[rows], max(total, len(rows)))

    def hits(self, orders: Ints) -> float:
        """The expected share of field tokens of the whole table that a prefix cache finds, 0 to 1, whole cells.

        ``orders``: int64 [rows, fields], the field order of each row. A prefix is computed once, by the first row
        that has it.
        """
        rows, fields = self.cells.shape
        cells = np.take_along_axis(self.cells, orders, 1)
        lengths = np.take_along_axis(self.lengths, orders, 1)
        prefix, missed = Prefix.empty(rows), 0.0
        for position in range(fields):
            prefix = prefix.longer(cells[:, position], self.total_rows)
            missed += prefix.misses(lengths[:, position], self.total_rows)
            if prefix.share >= 1.0:
                missed += float(lengths[:, position + 1 :].sum())
                break
        return 1 - missed / max(float(lengths.sum()), 1e-300)


class Prefix(NamedTuple):
    """The prefixes of sampled rows, up to some field.

    ``number``: int64 [rows], each row's prefix; ``first``: of each prefix the first row that has it; ``alone``: the rows
    whose prefix no other has; ``share``: distinct prefixes by row, in the whole table.
    """

    number: Ints
    first: Ints
    alone: Ints
    share: float

    @classmethod
    def empty(cls, rows: int) -> Prefix:
        return cls(np.zeros(rows, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64), 0.0)

    def longer(self, cells: Ints, total_rows: int) -> Prefix:
        """The prefixes with one more cell."""
        low = int(cells.min(initial=0))
        number, first, counts = numbered(self.number * (int(cells.max(initial=0)) - low + 1) + cells - low)
        share = distinct_in(counts, total_rows) / max(total_rows, 1)
        return Prefix(number, first, first[counts == 1], share)

    def misses(self, lengths: Floats, total_rows: int) -> float:
        """The length of last cells that no earlier row computed, in as many rows as were sampled."""
        rows = len(lengths)
        unseen = self.share * total_rows - len(self.first)
        missed = float(lengths[self.first].sum())
        if len(self.alone) and unseen > 0:  # prefixes that the sample missed are like those that it saw once
            missed += unseen * float(lengths[self.alone].mean())
        return min(missed * rows / max(total_rows, 1), float(lengths.sum()))


def numbered(keys: npt.NDArray[np.integer]) -> tuple[Ints, Ints, Ints]:
    """For each key its number among the distinct keys, and for each of those its first place and its count."""
    by = np.argsort(keys, kind="stable")
    ordered = keys[by]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))[: len(keys)]
    counts = np.diff(np.append(starts, len(keys)))
    number = np.empty(len(keys), np.int64)
    number[by] = np.repeat(np.arange(len(starts)), counts)
    return number, by[starts], counts
