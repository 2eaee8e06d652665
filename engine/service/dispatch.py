"""A task's stream over several engines: rows go where the coordinator says, and to others when an engine is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from spark_llm.engine.service.coordinator_protocol import Done
from spark_llm.engine.service.dispatch_groups import part
from spark_llm.engine.service.dispatch_part import Part
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, StreamOpen
from spark_llm.engine.service.stream import OPENINGS, RESTARTS, LimitReached
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.dispatch_client import ClusterClient

_TELL_SECONDS = 0.25  # between two notices of rows that are done
_FIRST_GUESS = 16.0  # tokens of an answer, at most, before there are any


class DispatchedStream:
    """An AnswerSource (``answers``). Each row is at one engine at a time, so that none is lost or answered twice.

    Rows of an engine that is lost are asked elsewhere, those that have been at an engine when it was lost more than
    RESTARTS times are not: LLM_ENGINE_LOST, raised by ``receive``.
    """

    def __init__(self, client: ClusterClient, header: StreamOpen) -> None:
        self.header = header
        self.stopped = False
        self._client = client
        self._changed = threading.Condition()  # guards what follows, and the parts' state
        self._parts: dict[str, Part] = {}  # by engine
        self._open: dict[int, int] = {}  # row that is not received yet -> its share, -1: of none
        self._losses: Counter[int] = Counter()  # of rows that were at an engine that was lost
        self._late: deque[pa.RecordBatch] = deque()  # answers of engines that are lost by now
        self._error: BaseException | None = None
        self._closed = False
        self._placing = threading.RLock()  # one at a time gives rows to engines
        self._failed_openings = 0  # since the last answer
        self._done: dict[int, list[int]] = {}  # share -> rows, computed and output tokens not told yet
        self._told_at = time.monotonic()
        self._answered = self._output_tokens = 0
        client.attach(self)

    def send(self, batch: pa.RecordBatch) -> None:
        """Asks for the rows of ``batch`` (REQUEST_SCHEMA; ids not used before in this stream)."""
        if batch.schema != REQUEST_SCHEMA:
            batch = batch.cast(REQUEST_SCHEMA)
        ids = batch.column("id").to_pylist()
        with self._changed:
            if self._closed:
                raise ValueError("the stream is closed")
            if len(set(ids)) < len(ids) or not self._open.keys().isdisjoint(ids):
                raise ValueError("row ids must be unique within a stream")
            self._open.update(dict.fromkeys(ids, -1))
        if ids and not self.stopped:
            with self._placing:
                self._recover()  # no row goes to an engine that is known to be lost
                self._place(batch)

    def receive(self) -> pa.RecordBatch | None:
        """The next answers (ANSWER_SCHEMA, one row or more); None when every row sent has been received."""
        while True:
            with self._changed:
                self._changed.wait_for(self._has_news)
                batch = self._take()
                if batch is None and (self._closed or self.stopped or not self._lost_parts()):
                    self._end()
                    return None
            if batch is not None:
                self._count(batch)
                return batch
            self._recover()

    @property
    def unanswered(self) -> int:
        """How many rows have been sent and not been received."""
        return len(self._open)

    def stop(self) -> None:
        """The query has enough rows: those that are open will not be answered."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
            parts = list(self._parts.values())
        for each in parts:
            each.stop()

    def abandon(self, engine: str, reason: str) -> None:
        """An engine is to be taken for lost, even if its connection seems to stand."""
        with self._changed:
            lost = self._parts.get(engine)
        if lost is not None:
            lost.abandon(reason)

    def close(self) -> None:
        """Ends the stream and cancels what is unanswered; may be called again, and from any thread."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            parts = list(self._parts.values())
            for share in self._open.values():
                self._add_done(share, 1, 0, 0)
        self._client.detach(self)
        for each in parts:
            each.close()
        self._tell()

    def __enter__(self) -> DispatchedStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ----

    def _has_news(self) -> bool:
        return (
            self._closed
            or self.stopped
            or not self._open
            or bool(self._late)
            or self._error is not None
            or any(each.has_answers or each.error is not None for each in self._parts.values())
        )

    def _take(self) -> pa.RecordBatch | None:
        if self._late:
            return self._late.popleft()
        return next((found for found in map(Part.take, self._parts.values()) if found is not None), None)

    def _lost_parts(self) -> dict[str, Part]:
        return {engine: each for engine, each in self._parts.items() if each.is_lost and self._error is None}

    def _end(self) -> None:
        """Why there is nothing more to receive."""
        errors = [self._error, *(each.error for each in self._parts.values() if not each.is_lost)]
        for error in errors:
            if error is not None:
                raise error
        if self._open and self._closed:
            raise LlmError("LLM_CANCELLED")
        if self._open and self.stopped:
            raise LimitReached
        assert not self._open

    def _place(self, batch: pa.RecordBatch) -> None:
        """Give rows to engines, which are asked by the streams of ``_parts``."""
        with self._placing:
            placed = self._client.place(batch, self.header, self._expected_output())
            ids = batch.column("id").to_numpy()
            with self._changed:
                if self._closed:
                    return
                for share, _, rows in placed:
                    self._open.update(dict.fromkeys(ids[rows].tolist(), share))
            for engine in dict.fromkeys(engine for _, engine, _ in placed):
                own = np.sort(np.concatenate([rows for _, to, rows in placed if to == engine]))
                with contextlib.suppress(ValueError):  # closed meanwhile
                    self._part(engine).send(part(batch, own))

    def _part(self, engine: str) -> Part:
        known = self._parts.get(engine)
        if known is None:
            known = Part(self._client.reach(engine), self.header, self._changed)
            with self._changed:
                self._parts[engine] = known
                is_closed = self._closed
            if is_closed:
                known.close()
        return known

    def _recover(self) -> None:
        """Ask the rows of lost engines elsewhere. Raises LLM_ENGINE_LOST, and what a restart raises."""
        with self._placing:
            with self._changed:
                lost = self._lost_parts()
                for engine in lost:
                    del self._parts[engine]
            try:
                for engine, each in lost.items():
                    self._move(engine, each)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                raise

    def _move(self, engine: str, lost: Part) -> None:
        """Take the rows of a lost engine to others."""
        rest, answers = lost.leave()
        rows = [row for batch in rest for row in batch.column("id").to_pylist()]
        with self._changed:
            self._late += answers
            for row in rows:
                self._add_done(self._open[row], 1, 0, 0)  # of its share; it will be of another
            self._changed.notify_all()
        lost.close()
        self._client.lost(engine, lost.taken_in)
        if lost.taken_in:
            self._losses.update(rows)
            if max(self._losses.values(), default=0) > RESTARTS:
                raise lost.give_up(len(self._open))
        else:
            self._failed_openings += 1
            if self._failed_openings > OPENINGS + self._client.known_engines:
                raise lost.give_up(len(self._open))
        for batch in rest:
            self._place(batch)

    def _count(self, batch: pa.RecordBatch) -> None:
        """Takes note of answers."""
        columns = (batch.column(name).to_pylist() for name in ("id", "computed_tokens", "output_tokens"))
        with self._changed:
            for row, computed, output in zip(*columns, strict=True):
                self._add_done(self._open.pop(row), 1, computed, output)
                self._losses.pop(row, None)
                self._output_tokens += output
            self._answered += batch.num_rows
            self._failed_openings = 0
            is_due = not self._open or time.monotonic() - self._told_at >= _TELL_SECONDS
        if is_due:
            self._tell()

    def _expected_output(self) -> float:
        """Tokens of an answer: the mean so far, once there are some."""
        if self._answered:
            return self._output_tokens / self._answered
        return min(self.header.params.max_tokens, _FIRST_GUESS)

    def _add_done(self, share: int, rows: int, computed: int, output: int) -> None:
        if share >= 0:
            done = self._done.setdefault(share, [0, 0, 0])
            for at, more in enumerate((rows, computed, output)):
                done[at] += more

    def _tell(self) -> None:
        with self._changed:
            done, self._done = self._done, {}
            self._told_at = time.monotonic()
        if done:
            self._client.finished([Done(share, *counts) for share, counts in done.items()])
