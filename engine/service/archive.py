"""The durable part of the result cache: a folder of segments that many engines write, and this engine's index of it.

The index has 16 bytes an answer: the first half of its digest, and where it lies. A hit reads its segment and compares
the whole digest. Engines see each other's answers when a query begins, and never wait for each other. Small segments
are merged; who finds one gone looks at the folder again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from spark_llm.engine.service import segments
from spark_llm.engine.service.answer_index import ENTRY_BYTES, AnswerIndex
from spark_llm.engine.service.segments import DIGEST_BYTES, BadSegment, Segment, StoredAnswer
from spark_llm.errors import LlmError

log = logging.getLogger("archive")

VERSION = "answers-1"  # of keys and files; a later one begins another folder
SMALL_ANSWERS = 1024  # of a segment that is merged with others,
MOST_SMALL = 64  # where there are more than so many of them,
_MOST_MERGED = 1024  # so many at a time,
_MERGED_ANSWERS = 4096  # into segments of so many answers
_FORGOTTEN_SECONDS = 3600.0  # after which a file that was never committed is of an engine that died
_READERS = 8  # segments read at a time
_LISTINGS = 3  # of the folder, while segments are merged under the reader's eyes
_FAILURES = (OSError, pa.ArrowException, ValueError)


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment that the index holds, or one that cannot be used (rows 0). at: seconds since 1970."""

    name: str
    at: float
    rows: int


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
        self._index = AnswerIndex()
        self._loaded: OrderedDict[int, Segment] = OrderedDict()
        self._loaded_bytes = 0
        self._refreshing = threading.Lock()
        self._trimmed = -1.0  # up to when all is deleted, seconds since 1970; of the thread that writes, as is the next
        self._untrimmed = 0  # bytes written since

    @property
    def num_bytes(self) -> int:
        """Bytes in memory: the index, and segments that were read lately."""
        return self._loaded_bytes + ENTRY_BYTES * len(self._index)

    @property
    def num_segments(self) -> int:
        """Segments in the index."""
        return sum(known.rows > 0 for known in list(self._known))

    def refresh(self, most_bytes: int, cleared: float) -> None:
        """Takes segments that others have written since into the index, as far as it then has ``most_bytes``.

        Not those with answers from before ``cleared`` (seconds since 1970). Raises LLM_CACHE_UNAVAILABLE.
        """
        with self._refreshing:
            for _ in range(_LISTINGS):
                if self._take_new(most_bytes, cleared):
                    return

    def _take_new(self, most_bytes: int, cleared: float) -> bool:
        """Lists the folder and reads what is new; False: a segment went meanwhile, into one that the list lacks."""
        with self._lock:
            before = [(known.name, number) for number, known in enumerate(self._known) if known.rows]
        try:
            listed = self._files.get_file_info(pafs.FileSelector(self._folder))
        except _FAILURES as error:
            raise self._unavailable(error) from error
        times = {info.base_name: segments.given_at(info.base_name) for info in listed}
        self._forget([number for name, number in before if name not in times])
        with self._lock:
            room = most_bytes // ENTRY_BYTES - len(self._index)
            new = [(at, name) for name, at in times.items() if at is not None and name not in self._names]
        new = sorted(((at, name) for at, name in new if at >= cleared), reverse=True)
        is_current = True
        with ThreadPoolExecutor(_READERS) as readers:
            for (at, name), keys in zip(new, readers.map(self._read_keys, (name for _, name in new)), strict=True):
                if keys is None:
                    is_current = False
                    continue
                room -= len(keys) // DIGEST_BYTES
                if room < 0:
                    log.warning("%s has more answers than the memory of its index: the oldest are not used", self.path)
                    return True
                self._add(name, at, keys)
        return is_current

    def find(self, digests: Sequence[bytes], cleared: float, most_bytes: int) -> dict[int, StoredAnswer]:
        """Position in ``digests`` -> answer, for those that are known and not from before ``cleared``.

        most_bytes: of segments that stay in memory. Segments that are gone or damaged hold nothing.
        """
        found, is_current = self._find(digests, cleared, most_bytes)
        if not is_current:
            with contextlib.suppress(LlmError):
                self.refresh(most_bytes, cleared)
            found, _ = self._find(digests, cleared, most_bytes)
        return found

    def _find(self, digests: Sequence[bytes], cleared: float, most_bytes: int) -> tuple[dict[int, StoredAnswer], bool]:
        """What is found; False: a segment of the index is not there any more."""
        places: dict[int, list[tuple[int, int]]] = {}
        with self._lock:
            for position, number, row in self._index.places(digests):
                if self._known[number].at >= cleared:
                    places.setdefault(number, []).append((position, row))
        found: dict[int, StoredAnswer] = {}
        is_current = True
        for number, rows in places.items():
            rows = [(position, row) for position, row in rows if position not in found]
            segment = self._segment(number, most_bytes) if rows else None
            is_current = is_current and (segment is not None or not rows)
            if segment is not None:
                given = self._known[number].at
                found |= {
                    position: segment.answer(row, given)
                    for position, row in rows
                    if segment.key(row) == digests[position]
                }
        return found, is_current

    def append(self, answers: Sequence[tuple[bytes, StoredAnswer]]) -> None:
        """Writes and commits a segment of ``answers`` (digest, answer). Raises OSError, ArrowException."""
        name, size = segments.write(self._files, self._folder, answers)
        self._untrimmed += size
        log.info("kept answers=%d bytes=%d in %s", len(answers), size, name)
        self._add(name, segments.given_at(name) or 0.0, b"".join(digest for digest, _ in answers))

    def merge(self, cleared: float) -> None:
        """Puts small segments together, where there are more than MOST_SMALL. Raises OSError, ArrowException.

        What they hold is committed before they are deleted, so an answer may stand twice for a while (and until the
        next time, where two engines merge the same), but is never missing. Not those from before ``cleared``.
        """
        with self._lock:
            known = [(each.at, number) for number, each in enumerate(self._known) if 0 < each.rows <= SMALL_ANSWERS]
        small = [number for at, number in sorted(known) if at >= cleared]
        if len(small) <= MOST_SMALL:
            return
        small = small[:_MOST_MERGED]
        answers: dict[bytes, StoredAnswer] = {}
        merged: list[int] = []
        with ThreadPoolExecutor(_READERS) as readers:
            for number, segment in zip(small, readers.map(self._read, small), strict=True):
                if segment is None:
                    continue
                merged.append(number)
                at = self._known[number].at
                answers |= {segment.key(row): segment.answer(row, at) for row in range(len(segment.reasons))}
        kept = list(answers.items())
        for start in range(0, len(kept), _MERGED_ANSWERS):
            self.append(kept[start : start + _MERGED_ANSWERS])
        for number in merged:
            with contextlib.suppress(FileNotFoundError):  # another engine was faster
                self._files.delete_file(f"{self._folder}/{self._known[number].name}")
        self._forget(merged)
        log.info("merged segments=%d answers=%d in %s", len(merged), len(kept), self.path)

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

    def _read_keys(self, name: str) -> bytes | None:
        """The digests of a segment's answers: none of a damaged one; None of one that is not there any more."""
        try:
            return segments.read_keys(self._files, f"{self._folder}/{name}")
        except FileNotFoundError:
            log.info("segment %s was deleted", name)
            return None
        except BadSegment as error:
            log.warning("a segment is skipped: %s", error)
            return b""

    def _add(self, name: str, at: float, keys: bytes) -> None:
        with self._lock:
            if name in self._names:
                return
            self._names.add(name)
            self._index.add(len(self._known), keys)
            self._known.append(_Known(name, at, len(keys) // DIGEST_BYTES))

    def _segment(self, number: int, most_bytes: int) -> Segment | None:
        """A segment from memory or from the folder; None if it is gone or damaged."""
        with self._lock:
            known, loaded = self._known[number], self._loaded.get(number)
            if loaded is not None:
                self._loaded.move_to_end(number)
        if loaded is not None or not known.rows:
            return loaded
        segment = self._read(number)
        if segment is None:
            return None
        with self._lock:
            if number not in self._loaded:
                self._loaded[number] = segment
                self._loaded_bytes += segment.num_bytes
            while self._loaded_bytes > most_bytes and len(self._loaded) > 1:
                self._loaded_bytes -= self._loaded.popitem(last=False)[1].num_bytes
        return segment

    def _read(self, number: int) -> Segment | None:
        """A segment from the folder; None, and forgotten, if it is gone or damaged."""
        try:
            return segments.read(self._files, f"{self._folder}/{self._known[number].name}")
        except FileNotFoundError as error:
            log.info("a segment was deleted or merged: %s", error)
        except BadSegment as error:
            log.warning("a segment is not used any more: %s", error)
        self._forget([number])
        return None

    def _forget(self, numbers: Collection[int]) -> None:
        """Take segments out of the index."""
        if not numbers:
            return
        with self._lock:
            for number in numbers:
                known, loaded = self._known[number], self._loaded.pop(number, None)
                self._known[number] = _Known(known.name, known.at, 0)
                self._loaded_bytes -= 0 if loaded is None else loaded.num_bytes
            self._index.forget(numbers)

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
