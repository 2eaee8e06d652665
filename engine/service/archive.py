"""The durable part of the result cache: a folder of segments that many engines write, and this engine's index of it.

The index has 16 bytes an answer: the first half of its digest, and where it lies. A hit reads its segment and compares
the whole digest. Engines see each other's answers when a query begins, and never wait for each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from spark_llm.engine.service import segments
from spark_llm.engine.service.segments import DIGEST_BYTES, BadSegment, Segment, StoredAnswer
from spark_llm.errors import LlmError

log = logging.getLogger("archive")

VERSION = "answers-1"  # of keys and files; a later one begins another folder
ENTRY_BYTES = 16  # of an answer in the index
_FORGOTTEN_SECONDS = 3600.0  # after which a file that was never committed is of an engine that died
_READERS = 8  # segments read at a time
_FAILURES = (OSError, pa.ArrowException, ValueError)


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment that the index holds, or one that cannot be used (rows 0). at: seconds since 1970."""

    name: str
    at: float
    rows: int


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


class Archive:
    """One folder of answers, for one model. Safe to call from several threads.

    path: of ``spark.llm.cache.path``: any path or URI that pyarrow knows. fingerprint: of the model.
    Raises LLM_CACHE_UNAVAILABLE for a folder that cannot be made, listed or written.
    """

    def __init__(self, path: str, fingerprint: str) -> None:
        self.path = path
        try:
            self._files, root = _file_system(path)
            self._base = f"{root}/{VERSION}"
            self._folder = f"{self._base}/{fingerprint}"
            self._files.create_dir(self._folder, recursive=True)
            probe = f"{self._folder}/{segments.TEMPORARY}{os.urandom(8).hex()}"
            self._files.open_output_stream(probe).close()
            self._files.delete_file(probe)
        except _FAILURES as error:
            raise self._unavailable(error) from error
        self._lock = threading.Lock()  # of what follows
        self._known: list[_Known] = []
        self._names: set[str] = set()
        self._runs: list[_Run] = []
        self._indexed = 0  # answers
        self._loaded: OrderedDict[int, Segment] = OrderedDict()
        self._loaded_bytes = 0
        self._refreshing = threading.Lock()
        self._trimmed = -1.0  # up to when all is deleted, seconds since 1970; of the thread that writes, as is the next
        self._untrimmed = 0  # bytes written since

    @property
    def num_bytes(self) -> int:
        """Bytes in memory: the index, and segments that were read lately."""
        return self._loaded_bytes + ENTRY_BYTES * self._indexed

    @property
    def num_segments(self) -> int:
        """Segments in the index."""
        return sum(known.rows > 0 for known in list(self._known))

    def refresh(self, most_bytes: int, cleared: float) -> None:
        """Takes segments that others have written since into the index, as far as it then has ``most_bytes``.

        Not those with answers from before ``cleared`` (seconds since 1970). Raises LLM_CACHE_UNAVAILABLE.
        """
        with self._refreshing:
            try:
                listed = self._files.get_file_info(pafs.FileSelector(self._folder))
            except _FAILURES as error:
                raise self._unavailable(error) from error
            times = {info.base_name: segments.given_at(info.base_name) for info in listed}
            with self._lock:
                room = most_bytes // ENTRY_BYTES - self._indexed
                new = [(at, name) for name, at in times.items() if at is not None and name not in self._names]
            new = sorted(((at, name) for at, name in new if at >= cleared), reverse=True)
            with ThreadPoolExecutor(_READERS) as readers:
                for (at, name), keys in zip(new, readers.map(self._read_keys, (name for _, name in new)), strict=True):
                    room -= len(keys) // DIGEST_BYTES
                    if room < 0:
                        log.warning(
                            "%s has more answers than the memory of its index: the oldest are not used", self.path
                        )
                        return
                    self._add(name, at, keys)

    def find(self, digests: Sequence[bytes], cleared: float, most_bytes: int) -> dict[int, StoredAnswer]:
        """Position in ``digests`` -> answer, for those that are known and not from before ``cleared``.

        most_bytes: of segments that stay in memory. Segments that are gone or damaged hold nothing.
        """
        wanted = np.frombuffer(b"".join(digests), "<u8")[::2]
        places: dict[int, list[tuple[int, int]]] = {}
        with self._lock:
            for run in self._runs:
                left = np.searchsorted(run.prefix, wanted, "left")
                right = np.searchsorted(run.prefix, wanted, "right")
                for position in np.flatnonzero(left < right).tolist():
                    for at in range(left[position], right[position]):
                        number = int(run.segment[at])
                        if self._known[number].at >= cleared:
                            places.setdefault(number, []).append((position, int(run.row[at])))
        found: dict[int, StoredAnswer] = {}
        for number, rows in places.items():
            rows = [(position, row) for position, row in rows if position not in found]
            segment = self._segment(number, most_bytes) if rows else None
            if segment is not None:
                given = self._known[number].at
                found |= {
                    position: segment.answer(row, given)
                    for position, row in rows
                    if segment.key(row) == digests[position]
                }
        return found

    def append(self, answers: Sequence[tuple[bytes, StoredAnswer]]) -> None:
        """Writes and commits a segment of ``answers`` (digest, answer). Raises OSError, ArrowException."""
        name, size = segments.write(self._files, self._folder, answers)
        self._untrimmed += size
        log.info("kept answers=%d bytes=%d in %s", len(answers), size, name)
        self._add(name, segments.given_at(name) or 0.0, b"".join(digest for digest, _ in answers))

    def trim(self, max_size: int, cleared: float) -> None:
        """Deletes segments of all models: those from before ``cleared``, and the oldest beyond ``max_size`` bytes.

        max_size 0: no limit. Also what engines that died never committed. Lists the folder only where there may be
        something to delete: this engine may go beyond ``max_size`` by a 64th. Raises OSError, ArrowException.
        """
        if self._trimmed >= cleared and (not max_size or self._untrimmed * 64 < max_size):
            return
        self._trimmed, self._untrimmed = cleared, 0
        kept: list[tuple[float, str, int]] = []
        gone: list[str] = []
        for info in self._files.get_file_info(pafs.FileSelector(self._base, recursive=True)):
            at = segments.given_at(info.base_name)
            if at is not None:
                kept.append((at, info.path, info.size or 0))
            elif info.base_name.startswith(segments.TEMPORARY) and _is_forgotten(info):
                gone.append(info.path)
        kept.sort(reverse=True)
        size = 0
        for at, path, length in kept:
            size += length
            if at < cleared or 0 < max_size < size:
                gone.append(path)
        for path in gone:
            with contextlib.suppress(FileNotFoundError):  # another engine was faster
                self._files.delete_file(path)
            log.info("deleted %s", path)

    def _read_keys(self, name: str) -> bytes:
        try:
            return segments.read_keys(self._files, f"{self._folder}/{name}")
        except FileNotFoundError:
            log.info("segment %s was deleted", name)
        except BadSegment as error:
            log.warning("a segment is skipped: %s", error)
        return b""

    def _add(self, name: str, at: float, keys: bytes) -> None:
        rows = len(keys) // DIGEST_BYTES
        with self._lock:
            if name in self._names:
                return
            self._names.add(name)
            self._known.append(_Known(name, at, rows))
            self._indexed += rows
            number = np.full(rows, len(self._known) - 1, np.uint32)
            prefix = np.frombuffer(keys, "<u8")[::2].astype(np.uint64)
            self._runs.append(_Run.of([_Run(prefix, number, np.arange(rows, dtype=np.uint32))]))
            # each merge at least doubles a part: an answer is moved O(log answers) times, and few parts are looked into
            while len(self._runs) > 1 and len(self._runs[-2].prefix) <= 2 * len(self._runs[-1].prefix):
                self._runs[-2:] = [_Run.of(self._runs[-2:])]

    def _segment(self, number: int, most_bytes: int) -> Segment | None:
        """A segment from memory or from the folder; None if it is gone or damaged."""
        with self._lock:
            known, loaded = self._known[number], self._loaded.get(number)
            if loaded is not None:
                self._loaded.move_to_end(number)
        if loaded is not None or not known.rows:
            return loaded
        try:
            segment = segments.read(self._files, f"{self._folder}/{known.name}")
        except (FileNotFoundError, BadSegment) as error:
            log.warning("a segment is not used any more: %s", error)
            with self._lock:
                self._known[number] = _Known(known.name, known.at, 0)
            return None
        with self._lock:
            if number not in self._loaded:
                self._loaded[number] = segment
                self._loaded_bytes += segment.num_bytes
            while self._loaded_bytes > most_bytes and len(self._loaded) > 1:
                self._loaded_bytes -= self._loaded.popitem(last=False)[1].num_bytes
        return segment

    def _unavailable(self, error: BaseException) -> LlmError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return LlmError("LLM_CACHE_UNAVAILABLE", path=self.path, reason=reason)


def _is_forgotten(info: pafs.FileInfo) -> bool:
    return info.mtime_ns is not None and time.time() - info.mtime_ns / 1e9 > _FORGOTTEN_SECONDS


def _file_system(path: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system and the path on it, of a path or URI as Hadoop writes it."""
    scheme, colon, rest = path.partition("://")
    if colon and scheme in ("s3a", "s3n"):
        path = f"s3://{rest}"
    if "://" not in path and not path.startswith("file:"):
        path = os.path.abspath(os.path.expanduser(path))
    files, root = pafs.FileSystem.from_uri(path)
    return files, root.rstrip("/")
