"""A window's rows as what is dispatched: runs of neighbours that share leading segments. Knows segments, no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from spark_llm.engine.service.routing import Path, Run, path_of

Ints = npt.NDArray[np.int64]

_MOST_RUNS = 128  # about, of a window: what a run of fewer rows could save is not worth a decision of its own
_CHARACTERS = 4  # of a token, about


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of a REQUEST_SCHEMA batch: row i is ``texts[codes[i]]``, joined.

    codes: int64 [rows, depth], -1 beyond a row's last segment. start: a hash of the system message, which comes before.
    """

    texts: list[str]
    codes: Ints
    start: int

    @classmethod
    def of(cls, batch: pa.RecordBatch, system: str | None) -> SegmentTable:
        column = batch.column("segments")
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
        lengths = np.diff(offsets)
        codes = np.full((len(column), int(lengths.max(initial=0))), -1, np.int64)
        codes[np.arange(codes.shape[1]) < lengths[:, None]] = values.indices.to_numpy(zero_copy_only=False)
        return cls(values.dictionary.to_pylist(), codes, xxhash.xxh3_64_intdigest((system or "").encode()))

    @cached_property
    def shared(self) -> Ints:
        """int64 [rows - 1]: how many leading segments a row and the one after it share."""
        if not self.codes.shape[1]:
            return np.zeros(max(0, len(self.codes) - 1), np.int64)
        equal = (self.codes[:-1] == self.codes[1:]) & (self.codes[1:] >= 0)
        shared: Ints = np.where(equal.all(axis=1), equal.shape[1], equal.argmin(axis=1))
        return shared

    @cached_property
    def tokens(self) -> Ints:
        """int64 [rows, depth + 1]: of a row's leading segments, about."""
        sizes = np.array([*(-(-len(text) // _CHARACTERS) for text in self.texts), 0], np.int64)
        tokens: Ints = np.pad(np.cumsum(sizes[self.codes], axis=1), ((0, 0), (1, 0)))
        return tokens

    def path(self, row: int, depth: int) -> Path:
        """The blocks of the first ``depth`` segments of a row."""
        segments = [self.texts[code] for code in self.codes[row, :depth].tolist()]
        return path_of(segments, np.diff(self.tokens[row, : depth + 1]).tolist(), self.start)

    def runs(self) -> list[Run]:
        """All rows, in order, in about _MOST_RUNS runs at most.

        Where a run has many rows and some share more than all do, it is cut between those that share least, again and
        again; neighbours that would be small runs stay together, on the path that they all share.
        """
        rows = len(self.codes)
        small = max(1, rows // _MOST_RUNS)
        large = max(1, 4 * rows // _MOST_RUNS)
        found: list[tuple[int, int, int]] = []
        todo = [(0, rows)] if rows else []
        while todo:
            start, end = todo.pop()
            inner = self.shared[start : end - 1]
            if not len(inner):
                beside = self.shared[max(0, start - 1) : end]
                found.append((start, end, int(beside.max(initial=0)) if len(beside) else self.codes.shape[1]))
                continue
            least = int(inner.min())
            if end - start <= large or (inner == least).all():
                found.append((start, end, least))
                continue
            borders = [start, *(start + 1 + np.flatnonzero(inner == least)).tolist(), end]
            at = borders[0]
            for left, right in pairwise(borders):
                if right - left > small:
                    if left > at:
                        found.append((at, left, least))
                    todo.append((left, right))
                    at = right
                elif right - at >= large:
                    found.append((at, right, least))
                    at = right
            if at < end:
                found.append((at, end, least))
        return [Run(start, end, self.path(start, depth)) for start, end, depth in sorted(found)]

    def own_tokens(self, run: Run) -> float:
        """What a row of the run costs beyond the run's path, in prompt tokens, where rows go in this order: a mean."""
        rows = np.arange(run.start, run.end)
        known = np.concatenate(([len(run.path)], self.shared[run.start : run.end - 1]))
        return float(np.mean(self.tokens[rows, -1] - self.tokens[rows, known]))


def part(batch: pa.RecordBatch, rows: Ints) -> pa.RecordBatch:
    """Rows of a REQUEST_SCHEMA batch, with a dictionary of their own segments only: it travels with them."""
    if len(rows) == batch.num_rows:
        return batch
    taken = batch.take(pa.array(rows))
    at = taken.schema.get_field_index("segments")
    column = taken.column(at)
    values = column.values
    used, numbers = np.unique(values.indices.to_numpy(zero_copy_only=False), return_inverse=True)
    indices = pa.array(numbers.reshape(-1).astype(np.int32))
    own = pa.DictionaryArray.from_arrays(indices, values.dictionary.take(pa.array(used)))
    return taken.set_column(at, taken.schema.field(at), pa.ListArray.from_arrays(column.offsets, own))
