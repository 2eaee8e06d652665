"""Where stored answers lie: 16 bytes an answer, the first half of its digest, its segment and its row there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spark_llm.engine.service.segments import DIGEST_BYTES

ENTRY_BYTES = 16  # of an answer in the index


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A part of the index, ordered by ``prefix``: uint64, with uint32 segment and row, [answers] each."""

    prefix: npt.NDArray[np.uint64]
    segment: npt.NDArray[np.uint32]
    row: npt.NDArray[np.uint32]

    @staticmethod
    def of(parts: Sequence[_Run]) -> _Run:
        prefix = np.concatenate([part.prefix for part in parts])
        order = np.argsort(prefix, kind="stable")
        segment, row = (np.concatenate([getattr(part, name) for part in parts]) for name in ("segment", "row"))
        return _Run(prefix[order], segment[order], row[order])

    def without(self, segments: npt.NDArray[np.uint32]) -> _Run:
        kept = ~np.isin(self.segment, segments)
        return _Run(self.prefix[kept], self.segment[kept], self.row[kept])


class AnswerIndex:
    """Digests of answers by halves: what it finds has to be compared with the whole digest. Not thread-safe."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(len(run.prefix) for run in self._runs)

    def add(self, segment: int, keys: bytes) -> None:
        """keys: the digests of the segment's answers, one after the other."""
        rows = len(keys) // DIGEST_BYTES
        prefix = np.frombuffer(keys, "<u8")[::2].astype(np.uint64)
        run = _Run(prefix, np.full(rows, segment, np.uint32), np.arange(rows, dtype=np.uint32))
        self._runs.append(_Run.of([run]))
        # each merge at least doubles a part: an answer is moved O(log answers) times, and few parts are looked into
        while len(self._runs) > 1 and len(self._runs[-2].prefix) <= 2 * len(self._runs[-1].prefix):
            self._runs[-2:] = [_Run.of(self._runs[-2:])]

    def places(self, digests: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
        """(position in ``digests``, segment, row) of each answer whose digest begins as that one does."""
        wanted = np.frombuffer(b"".join(digests), "<u8")[::2]
        for run in self._runs:
            left = np.searchsorted(run.prefix, wanted, "left")
            right = np.searchsorted(run.prefix, wanted, "right")
            for position in np.flatnonzero(left < right).tolist():
                for at in range(left[position], right[position]):
                    yield position, int(run.segment[at]), int(run.row[at])

    def forget(self, segments: Collection[int]) -> None:
        """Take out the answers of these segments."""
        gone = np.array(list(segments), np.uint32)
        self._runs = [run for old in self._runs if len((run := old.without(gone)).prefix)]
