"""The numbers that statistics consist of."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class ColumnCounts:
    """One column: distinct values, and the mean length of its rendered cell in tokens; None: not known.

    table: what the column's values come from (a number a leaf of the plan); columns of one table with as many
    distinct values depend on each other.
    """

    distinct: int | None = None
    length: float | None = None
    table: int | None = None


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Of the rows that reach a call.

    source: where the numbers come from, in words. rows: how many there are, None: not known. columns: of the call's
    fields. prompt: of the prompt, where it differs by row. hashes, lengths: [sampled rows, fields] of a sample, the
    values' hashes (``hash_values``) and the rendered cells' lengths in tokens; None where there is no sample.
    partitions: of the input, None: not known.
    """

    source: str
    rows: int | None
    columns: tuple[ColumnCounts, ...]
    prompt: ColumnCounts | None = None
    hashes: Hashes | None = None
    lengths: Floats | None = None
    partitions: int | None = None

    @property
    def row_length(self) -> float | None:
        """Mean tokens of all fields of a row."""
        known = [column.length for column in self.columns]
        return None if any(length is None for length in known) else float(sum(filter(None, known)))
