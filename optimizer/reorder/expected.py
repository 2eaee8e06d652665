"""What an order of fields will share in a whole table of which only a sample of rows is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.order_table import mix

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def distinct_in(counts: Ints, total_rows: int) -> float:
    """How many distinct values ``total_rows`` rows have, of which a random sample has these ``counts`` of each value.

    Chao1's estimate of what the sample missed, ``f1² / 2 f2`` from the values seen once and twice, reached as the
    sample grows to ``total_rows`` (Chao et al., Rarefaction and extrapolation with Hill numbers, 2014, equation 9).
    Where no value repeats in the sample, all are taken to be distinct.
    """
    rows = int(counts.sum())
    seen = len(counts)
    once, twice = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    if total_rows <= rows or not once:
        return float(seen)
    if once == rows:  # nothing repeats: a key
        return float(total_rows)
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

    def at_most(self, rows: int) -> tuple[Sample, Ints]:
        """So many of the rows, drawn alike each time, of as large a table; and which they are."""
        kept = np.arange(len(self.cells))
        if len(kept) <= rows:
            return self, kept
        drawn = np.argsort(mix(kept.astype(np.uint64), np.uint64(1)), kind="stable")
        kept = np.sort(drawn[:rows])
        return Sample(self.cells[kept], self.lengths[kept], self.total_rows), kept

    def hits(self, orders: Ints) -> float:
        """The expected share of field tokens of the whole table that a prefix cache finds, 0 to 1, whole cells.

        ``orders``: int64 [rows, fields], the field order of each row. A prefix is computed once, by the first row
        that has it.
        """
        return float(self.row_hits(orders).sum()) / max(float(self.lengths.sum()), 1e-300)

    def row_hits(self, orders: Ints) -> Floats:
        """The length that each sampled row is expected to find computed, float64 [rows].

        What a prefix costs is borne by all rows that have it.
        """
        rows, fields = self.cells.shape
        cells = np.take_along_axis(self.cells, orders, 1)
        lengths = np.take_along_axis(self.lengths, orders, 1)
        prefix, found = Prefix.empty(rows), np.zeros(rows)
        for position in range(fields):
            prefix = prefix.longer(cells[:, position], self.total_rows)
            found += lengths[:, position] * prefix.found(self.total_rows)
            if prefix.share >= 1.0:
                break
        return found


class Prefix(NamedTuple):
    """The prefixes of sampled rows, up to some field.

    ``number``: int64 [rows], each row's prefix; ``counts``: int64 [prefixes], how many rows have it; ``share``:
    distinct prefixes by row, in the whole table.
    """

    number: Ints
    counts: Ints
    share: float

    @classmethod
    def empty(cls, rows: int) -> Prefix:
        return cls(np.zeros(rows, np.int64), np.array([rows], np.int64), 0.0)

    def longer(self, cells: Ints, total_rows: int) -> Prefix:
        """The prefixes with one more cell."""
        low = int(cells.min(initial=0))
        number, _, counts = numbered(self.number * (int(cells.max(initial=0)) - low + 1) + cells - low)
        return Prefix(number, counts, distinct_in(counts, total_rows) / max(total_rows, 1))

    def found(self, total_rows: int) -> Floats:
        """How probable it is that another row has computed a row's prefix, float64 [rows]."""
        scale = total_rows / max(len(self.number), 1)
        probability = 1 - 1 / (self.counts * scale)
        alone = self.counts == 1
        once = int(np.count_nonzero(alone))
        if once:  # prefixes that the sample missed are like those that it saw once, and share their rows
            unseen = self.share * total_rows - len(self.counts)
            probability[alone] = max(1 - (once + unseen) / (once * scale), 0.0)
        found: Floats = probability[self.number]
        return found


def numbered(keys: npt.NDArray[np.integer]) -> tuple[Ints, Ints, Ints]:
    """For each key its number among the distinct keys, and for each of those its first place and its count."""
    by = np.argsort(keys, kind="stable")
    ordered = keys[by]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))[: len(keys)]
    counts = np.diff(np.append(starts, len(keys)))
    number = np.empty(len(keys), np.int64)
    number[by] = np.repeat(np.arange(len(starts)), counts)
    return number, by[starts], counts
