"""The client's end of one exchange. It keeps every row until it is answered, so that rows survive an engine."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.service.protocol import ANSWER_SCHEMA, REQUEST_SCHEMA, StreamFailure, StreamOpen, ending
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.client import EngineClient
    from spark_llm.engine.service.remote import RemoteEngine

log = logging.getLogger(__name__)

RESTARTS = 1  # how often a stream survives the loss of its engine
OPENINGS = 5  # how often in a row a stream may find an engine that ends just then (idle timeout)
_BROKEN = (flight.FlightError, pa.ArrowException, OSError, StopIteration)


class LimitReached(Exception):
    """The query has as many rows as its LIMIT asks for: the stream's open rows will not be answered."""


@dataclass(eq=False)
class _Window:
    """A batch as it was sent, and those of its rows that have no answer yet."""

    batch: pa.RecordBatch
    unanswered: set[int]

    def rest(self) -> pa.RecordBatch:
        ids = self.batch.column("id").to_pylist()
        if len(ids) == len(self.unanswered):
            return self.batch
        return self.batch.filter(pa.array([row in self.unanswered for row in ids]))


class AnswerStream:
    """Rows go in by ``send``, answers come out of ``receive`` in the order in which rows finish.

    Both sides may be used by different threads. When the engine is lost the stream starts it once more and sends
    again what is unanswered; a second loss is LLM_ENGINE_LOST, raised by ``receive``.

    stopped: the engine answers no further row, because the limit of the stream's node is reached. changed: the lock of
    the stream's state, which is notified of answers and of the end; streams may share one.
    """

    restarts = RESTARTS
    openings = OPENINGS

    def __init__(
        self, client: EngineClient | RemoteEngine, header: StreamOpen, changed: threading.Condition | None = None
    ) -> None:
        self._client = client
        self._header = header
        self._windows: dict[int, _Window] = {}  # row id -> its window, while unanswered
        self._answers: deque[pa.RecordBatch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self.stopped = False
        self._changed = changed or threading.Condition()  # guards everything above
        self._writing = threading.Lock()  # guards the connection below: one writer at a time
        self._writer: flight.FlightStreamWriter | None = None
        self._reader: flight.FlightStreamReader | None = None
        self._taken_in = False  # by the engine: losing it from here on counts
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def send(self, batch: pa.RecordBatch) -> None:
        """Asks for the rows of ``batch`` (REQUEST_SCHEMA; ids not used before in this stream).

        Rows sent after the stop are open, but nobody answers them.
        """
        if batch.schema != REQUEST_SCHEMA:
            batch = batch.cast(REQUEST_SCHEMA)
        ids = batch.column("id").to_pylist()
        window = _Window(batch, set(ids))
        with self._writing:
            with self._changed:
                if self._closed:
                    raise ValueError("the stream is closed")
                if len(window.unanswered) < len(ids) or not self._windows.keys().isdisjoint(ids):
                    raise ValueError("row ids must be unique within a stream")
                self._windows.update(dict.fromkeys(ids, window))
            if self._writer is not None and ids and not self.stopped:
                # the thread that reads sees a loss too, and sends the rows again
                with contextlib.suppress(flight.FlightError, OSError):
                    self._writer.write_batch(batch)

    def receive(self) -> pa.RecordBatch | None:
        """The next answers (ANSWER_SCHEMA, one row or more); None when every row sent has been received.

        Raises LLM_ENGINE_LOST, what a restart raises, or what made the engine refuse the stream; LimitReached when the
        rows that are open will not be answered because the query has enough.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._answers or self._error or self._closed or self.stopped or not self._windows
            )
            if self._answers:
                return self._answers.popleft()
            if self._error is not None:
                raise self._error
            if self._closed and self._windows:
                raise LlmError("LLM_CANCELLED")
            if self.stopped and self._windows:
                raise LimitReached
            return None

    @property
    def unanswered(self) -> int:
        """How many rows have been sent and not been answered."""
        return len(self._windows)

    def close(self) -> None:
        """Ends the stream and cancels what is unanswered; may be called again, and from any thread."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        reader = self._reader
        if reader is not None:
            reader.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the thread that reads

    def _run(self) -> None:
        losses = openings = 0
        try:
            while not self._closed:
                try:
                    reader = self._open()
                    openings = 0
                    self._read(reader)
                except _BROKEN as error:
                    if self._closed or self.stopped:
                        return
                    losses += self._taken_in
                    openings += not self._taken_in
                    reason = _reason(error)
                    log.warning("engine lost: %s; rows unanswered=%d", reason, len(self._windows))
                    if losses > self.restarts or openings > self.openings:
                        raise self._lost(losses + openings, reason) from error
                    self._drop()
                    self._client.reconnect()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
        finally:
            self._drop()

    def _open(self) -> flight.FlightStreamReader:
        """Opens an exchange and sends what is unanswered. The engine's schema says that it took the stream in."""
        descriptor = flight.FlightDescriptor.for_command(msgspec.json.encode(self._header))
        with self._writing:
            self._taken_in = False
            writer, reader = self._client.channel().do_exchange(descriptor)
            self._reader = reader
            if self._closed:
                reader.cancel()
            writer.begin(REQUEST_SCHEMA)
            self._taken_in = reader.schema == ANSWER_SCHEMA
            with self._changed:
                windows = list(dict.fromkeys(self._windows.values()))
                batches = [window.rest() for window in windows]
            for batch in batches:
                writer.write_batch(batch)
            self._writer = writer
        return reader

    def _read(self, reader: flight.FlightStreamReader) -> None:
        while True:
            chunk = reader.read_chunk()
            if chunk.data is None:
                end = ending(chunk.app_metadata.to_pybytes())
                if isinstance(end, StreamFailure):
                    reader.cancel()
                    raise LlmError(end.condition, **end.parameters)
                with self._changed:
                    self.stopped = True
                    self._changed.notify_all()
                continue
            with self._changed:
                if self._closed:
                    return
                for row in chunk.data.column("id").to_pylist():
                    self._windows.pop(row).unanswered.discard(row)
                self._answers.append(chunk.data)
                self._changed.notify_all()

    def _drop(self) -> None:
        """Lets go of a connection that has ended: unclosed, it would complain on stderr when it is collected."""
        with self._writing:
            writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(*_BROKEN):
                writer.close()

    def _lost(self, times: int, reason: str) -> LlmError:
        path, tail = self._client.log()
        return LlmError(
            "LLM_ENGINE_LOST",
            model=self._client.spec.model,
            times=times,
            reason=reason,
            rows=len(self._windows),
            log=path,
            tail=tail,
        )


def _reason(error: BaseException) -> str:
    """One line of what gRPC said, without its own debugging context."""
    return " ".join(str(error).split()).partition(". gRPC client debug context")[0] or "the connection was closed"
