"""The result cache: answers of earlier queries, in memory and, where there is a path, in a folder that outlives it.

Streams look their rows up in their own threads; the engine's thread only leaves answers here, and another thread writes
them: neither waits for a file system.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from spark_llm.engine.request import Completion, FinishReason
from spark_llm.engine.service.archive import Archive
from spark_llm.engine.service.protocol import ResultCache
from spark_llm.engine.service.segments import DIGEST_BYTES, StoredAnswer
from spark_llm.errors import LlmError

log = logging.getLogger("results")

SEGMENT_ANSWERS = 4096  # written together at most,
SEGMENT_BYTES = 16 << 20  # or about so much,
SEGMENT_SECONDS = 5.0  # or what came in this time, or until the last stream closed
_ENTRY_BYTES = 400  # of an answer in memory, beside its tokens
_MOST_WAITING = 64 << 20  # bytes of answers that wait to be written, of all paths
_SHARE = 4  # the part of the memory that the index, and segments read lately, may take each
_KEPT_QUERIES = 1024


class Sizes(NamedTuple):
    """answers: in memory. bytes: of them, of indexes and of segments read lately. segments: files in use."""

    answers: int
    bytes: int
    segments: int


class Results:
    """The result cache of one engine. Safe to call from several threads.

    fingerprint: names the model for answers on disk; called once, when a path is first used.
    """

    def __init__(self, fingerprint: Callable[[], str], clock: Callable[[], float] = time.time) -> None:
        self._fingerprint = functools.cache(fingerprint)
        self._clock = clock
        self._lock = threading.Lock()  # of the answers in memory
        self._answers: OrderedDict[tuple[str, bytes], StoredAnswer] = OrderedDict()
        self._bytes = 0
        self._opening = threading.Lock()  # of the next two
        self._archives: dict[str, Archive] = {}
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._changed = threading.Condition()  # of what waits to be written
        self._waiting: dict[str, list[tuple[bytes, StoredAnswer]]] = {}
        self._waiting_bytes = 0  # and of what is being written
        self._caches: dict[str, ResultCache] = {}
        self._due = 0.0
        self._writing = False
        self._writer: threading.Thread | None = None

    def begin(self, cache: ResultCache, query: str) -> None:
        """A stream of ``query`` will look rows up: what other engines have written until now is known from here on.

        Raises LLM_CACHE_UNAVAILABLE.
        """
        if not cache.path:
            return
        with self._opening:
            if (cache.path, query) in self._seen:
                return
            archive = self._archives.get(cache.path) or self._open(cache.path)
            archive.refresh(cache.memory // _SHARE, cache.cleared)
            self._archives[cache.path] = archive
            self._seen[cache.path, query] = None
            if len(self._seen) > _KEPT_QUERIES:
                self._seen.popitem(last=False)

    def find(self, cache: ResultCache, keys: Sequence[bytes | None]) -> list[Completion | None]:
        """The answers of rows with these keys, None where there is none. A key is a stream's scope and a row's key."""
        digests = [None if key is None else _digest(key) for key in keys]
        found: list[StoredAnswer | None] = [None] * len(keys)
        with self._lock:
            for position, digest in enumerate(digests):
                answer = None if digest is None else self._answers.get((cache.path, digest))
                if answer is not None and answer.at >= cache.cleared:
                    self._answers.move_to_end((cache.path, digest))  # type: ignore[arg-type]
                    found[position] = answer
        archive = self._archives.get(cache.path)
        missing = [(at, digest) for at, digest in enumerate(digests) if digest is not None and found[at] is None]
        if archive is not None and missing:
            stored = archive.find([digest for _, digest in missing], cache.cleared, cache.memory // _SHARE)
            for number, answer in stored.items():
                position, digest = missing[number]
                found[position] = answer
                self._remember(cache, digest, answer)
        return [None if answer is None else _completion(answer) for answer in found]

    def keep(self, cache: ResultCache, key: bytes, completion: Completion) -> None:
        """Takes in the answer of a computed row; it must not be a failed one. Never waits.

        Where the file system is so slow that too much waits to be written, the answer stays in memory only.
        """
        output = np.array(completion.output, np.int32).tobytes()
        digest, reason = _digest(key), str(completion.finish_reason)
        answer = StoredAnswer(output, reason, self._clock(), completion.text, completion.confidence)
        self._remember(cache, digest, answer)
        if not cache.path:
            return
        with self._changed:
            if self._waiting_bytes + _size(answer) > _MOST_WAITING:
                return
            self._waiting_bytes += _size(answer)
            waiting = self._waiting.setdefault(cache.path, [])
            if not waiting:
                self._due = min(self._due or float("inf"), time.monotonic() + SEGMENT_SECONDS)
            waiting.append((digest, answer))
            self._caches[cache.path] = cache
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="results", daemon=True)
                self._writer.start()
            if len(waiting) == 1 or len(waiting) >= SEGMENT_ANSWERS or self._waiting_bytes >= SEGMENT_BYTES:
                self._changed.notify_all()

    def flush(self, timeout: float = 0.0) -> bool:
        """Answers that wait are written now. Waits ``timeout`` seconds for it; whether all are written."""
        with self._changed:
            if self._waiting:
                self._due = time.monotonic()
                self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting and not self._writing, timeout)

    def clear(self) -> None:
        """Forgets the answers in memory, the indexes, and what waits to be written."""
        with self._opening:
            self._archives.clear()
            self._seen.clear()
        with self._changed:
            self._waiting_bytes -= sum(map(_bytes, self._waiting.values()))
            self._waiting.clear()
        with self._lock:
            self._answers.clear()
            self._bytes = 0

    def sizes(self) -> Sizes:
        """What the status tells."""
        archives = list(self._archives.values())
        return Sizes(
            len(self._answers),
            self._bytes + sum(archive.num_bytes for archive in archives),
            sum(archive.num_segments for archive in archives),
        )

    def _open(self, path: str) -> Archive:
        try:
            fingerprint = self._fingerprint()
        except (OSError, ValueError, KeyError, LlmError) as error:
            reason = f"the files of the model cannot be read: {error}"
            raise LlmError("LLM_CACHE_UNAVAILABLE", path=path, reason=reason) from error
        return Archive(path, fingerprint)

    def _remember(self, cache: ResultCache, digest: bytes, answer: StoredAnswer) -> None:
        archive = self._archives.get(cache.path)
        most_bytes = cache.memory - (0 if archive is None else archive.num_bytes)
        with self._lock:
            old = self._answers.pop((cache.path, digest), None)
            if old is not None:
                self._bytes -= _size(old)
            self._answers[cache.path, digest] = answer
            self._bytes += _size(answer)
            while self._bytes > most_bytes and self._answers:
                self._bytes -= _size(self._answers.popitem(last=False)[1])

    # ---- the thread that writes

    def _write(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._waiting))
                self._changed.wait_for(self._is_due, max(0.0, self._due - time.monotonic()))
                waiting, self._waiting = self._waiting, {}
                self._due, self._writing = 0.0, True
                caches = dict(self._caches)
            for path, answers in waiting.items():
                self._write_out(caches[path], answers)
                with self._changed:
                    self._waiting_bytes -= _bytes(answers)

    def _is_due(self) -> bool:
        full = any(len(answers) >= SEGMENT_ANSWERS for answers in self._waiting.values())
        full = full or self._waiting_bytes >= SEGMENT_BYTES
        return full or not self._waiting or time.monotonic() >= self._due

    def _write_out(self, cache: ResultCache, answers: list[tuple[bytes, StoredAnswer]]) -> None:
        """Answers that cannot be written stay in memory: the query that asked for them does not fail."""
        try:
            archive = self._archives.get(cache.path) or self._open(cache.path)
            for start in range(0, len(answers), SEGMENT_ANSWERS):
                archive.append(answers[start : start + SEGMENT_ANSWERS])
            archive.merge(cache.cleared)
            archive.trim(cache.max_size, cache.cleared)
        except (OSError, pa.ArrowException, ValueError, LlmError) as error:  # for example: no space left
            log.warning("answers=%d cannot be kept in %s: %s", len(answers), cache.path, error)


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=DIGEST_BYTES).digest()


def _completion(answer: StoredAnswer) -> Completion:
    output = np.frombuffer(answer.output, np.int32).tolist()
    reason = FinishReason(answer.finish_reason)
    return Completion(-1, output, reason, 0, 0, 0, text=answer.text, confidence=answer.confidence)


def _size(answer: StoredAnswer) -> int:
    return _ENTRY_BYTES + len(answer.output) + len(answer.text or "")


def _bytes(answers: Sequence[tuple[bytes, StoredAnswer]]) -> int:
    return sum(_size(answer) for _, answer in answers)
