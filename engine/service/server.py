"""The Flight server of an engine process: one exchange is one stream of a task; actions ask and tell the rest."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.flight as flight
from msgspec.structs import replace

from spark_llm.engine.request import FinishReason
from spark_llm.engine.service.coordinator_protocol import Cluster, Join, Joined
from spark_llm.engine.service.folding import Answer, Stream
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.protocol import (
    ANSWER_SCHEMA,
    PROTOCOL_VERSION,
    StreamFailure,
    StreamOpen,
    StreamStop,
    WindowGrant,
    WindowRequest,
)
from spark_llm.engine.service.remote_member import Member
from spark_llm.engine.service.remote_server import RemoteServer
from spark_llm.engine.service.requests import Requests, as_llm_error
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.served import ServedText

log = logging.getLogger("server")

_LINGER_SECONDS = 5.0
_POLL_SECONDS = 0.02  # how long a vanished client may go unnoticed while there is nothing to write
_ACTIONS = {
    "status": "EngineStatus as JSON",
    "window": "WindowRequest as JSON -> WindowGrant as JSON",
    "clear_cache": "drop the result cache in memory",
    "join": "Join as JSON -> Joined as JSON: listen for tasks of other executors, too",
    "shutdown": "end the process",
}


class EngineServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves ``loop``'s engine on the Unix socket ``socket``, from construction on.

    The socket's folder decides who may connect. ``end`` is called for the ``shutdown`` action.
    """

    def __init__(self, socket: str, loop: EngineLoop, text: ServedText, owner: int, end: Callable[[], None]) -> None:
        self._loop = loop
        self._text = text
        self._owner = owner
        self._end = end
        self._member: Member | None = None  # of a cluster, once a task has asked for it
        self._joining = threading.Lock()
        super().__init__(f"grpc+unix://{socket}")

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[flight.Result]:
        answer: object = {}
        match action.type:
            case "status":
                address = "" if self._member is None else self._member.address
                answer = replace(self._loop.status(os.getpid(), self._owner), address=address)
            case "window":
                answer = WindowGrant(self._loop.window(_window_request(action.body)))
            case "clear_cache":
                self._loop.results.clear()
            case "join":
                answer = self._join(action.body)
            case "shutdown":
                threading.Timer(0.1, self._end).start()  # after the answer is out
            case _:
                raise flight.FlightServerError(f"unknown action {action.type!r}; known are {', '.join(_ACTIONS)}")
        return [flight.Result(pa.py_buffer(msgspec.json.encode(answer)))]

    def _join(self, body: pa.Buffer) -> Joined:
        with self._joining:
            if self._member is None:
                self._member = Member(self._listen, self._loop.watch_evictions().take)
        try:
            return self._member.join(msgspec.json.decode(body.to_pybytes(), type=Join))
        except (OSError, msgspec.MsgspecError) as error:
            raise flight.FlightServerError(str(error)) from error

    def _listen(self, host: str, cluster: Cluster) -> RemoteServer:
        return RemoteServer(host, cluster, self.do_exchange)

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return list(_ACTIONS.items())

    def do_exchange(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        writer.begin(ANSWER_SCHEMA)
        try:
            header = _header(descriptor.command)
        except LlmError as error:
            _fail(writer, error)
            _linger(context)
            return
        node = header.node if header.limit else ""
        cache = header.cache if header.query else None
        stream = Stream(header.query, _scope(header), self._loop.next_id(), node, cache)
        self._loop.open(stream)
        requests = Requests(self._loop, self._text, header, stream, reader)
        requests.start()
        try:
            self._answer(context, header, stream, requests, writer)
        except (flight.FlightError, pa.ArrowException, OSError):
            log.info("the client of query=%r went away", header.query)
        except Exception as error:
            log.exception("a stream of query=%r failed", header.query)
            _fail(writer, as_llm_error(error))
        finally:
            self._loop.close(stream)
            requests.join()  # the reader dies with this call, and a closed stream ends it

    def _answer(
        self,
        context: flight.ServerCallContext,
        header: StreamOpen,
        stream: Stream,
        requests: Requests,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        answered = 0
        told = False
        while not context.is_cancelled():
            error = requests.error or stream.error
            if error is not None:
                _fail(writer, error)
                return
            if requests.done and (answered == requests.rows or told):
                return
            stopped = stream.stopped  # what was answered before goes out first
            answers = _take(stream.outbox)
            if answers:
                writer.write_batch(_answer_batch(self._text, header, answers))
                answered += len(answers)
            if stopped and not told:
                told = True
                writer.write_metadata(msgspec.json.encode(StreamStop()))


def _header(command: bytes) -> StreamOpen:
    try:
        header = msgspec.json.decode(command, type=StreamOpen)
    except msgspec.DecodeError as error:
        raise LlmError("LLM_INVALID_REQUEST", reason=f"the header of the stream is malformed: {error}") from error
    if header.version != PROTOCOL_VERSION:
        reason = f"it speaks protocol {header.version}, the engine {PROTOCOL_VERSION}: use one version of spark-llm"
        raise LlmError("LLM_INVALID_REQUEST", reason=reason)
    return header


def _window_request(body: pa.Buffer) -> WindowRequest:
    try:
        return msgspec.json.decode(body.to_pybytes(), type=WindowRequest)
    except msgspec.DecodeError as error:
        raise flight.FlightServerError(f"malformed request for a window: {error}") from error


def _scope(header: StreamOpen) -> bytes:
    """What must be equal, beside the key, for rows of two streams to share an answer."""
    constants = msgspec.json.encode((header.params, header.system, header.constraint))
    return hashlib.blake2b(constants, digest_size=16).digest()


def _fail(writer: flight.MetadataRecordBatchWriter, error: LlmError) -> None:
    failure = StreamFailure(error.condition, error.parameters)
    try:
        writer.write_metadata(msgspec.json.encode(failure))
    except (flight.FlightError, pa.ArrowException, OSError):
        log.info("no client left to tell: %s", error)


def _linger(context: flight.ServerCallContext) -> None:
    """Wait for the client to hang up. One that still writes when the call ends sees a lost engine, not the failure."""
    deadline = time.monotonic() + _LINGER_SECONDS
    while not context.is_cancelled() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _take(outbox: queue.SimpleQueue[list[Answer]]) -> list[Answer]:
    """All answers that are ready; waits a moment if there are none."""
    answers: list[Answer] = []
    with contextlib.suppress(queue.Empty):
        answers += outbox.get(timeout=_POLL_SECONDS)
        while True:
            answers += outbox.get_nowait()
    return answers


def _answer_batch(text: ServedText, header: StreamOpen, answers: list[Answer]) -> pa.RecordBatch:
    rows = [answer.completion for answer in answers]
    spelled = [c.output for c in rows if c.finish_reason != FinishReason.ERROR and c.text is None]
    texts = iter(text.decode(spelled, header.params.stop))
    columns = [
        [answer.row for answer in answers],
        [c.text if c.finish_reason == FinishReason.ERROR or c.text is not None else next(texts) for c in rows],
        [str(c.finish_reason) for c in rows],
        [None if c.error is None else str(LlmError(c.error[0], **c.error[1])) for c in rows],
        [c.prompt_tokens for c in rows],
        [c.instruction_tokens for c in rows],
        [c.cached_tokens for c in rows],
        [min(c.cached_tokens, c.instruction_tokens) for c in rows],
        [c.computed_tokens for c in rows],
        [c.recomputed_tokens for c in rows],
        [0 if answer.folded or answer.stored else answer.completion.num_output for answer in answers],
        [answer.folded for answer in answers],
        [answer.stored for answer in answers],
        [c.confidence for c in rows],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ANSWER_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=ANSWER_SCHEMA)
