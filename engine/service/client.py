"""How a Spark task reaches the engine of its executor: connect, stream rows, survive one loss of the engine.

Light on purpose: no torch, no pyspark.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec
import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service import folder as folders
from spark_llm.engine.service import launch, process
from spark_llm.engine.service.folder import EngineFolder, EngineState
from spark_llm.engine.service.probe import ask, connection
from spark_llm.engine.service.protocol import EngineStatus, StreamOpen, WindowGrant, WindowRequest
from spark_llm.engine.service.stream import AnswerStream, LimitReached

__all__ = ["AnswerStream", "EngineClient", "LimitReached", "clear_caches", "connect", "list_engines"]

_STATUS_SECONDS = 10.0
_LOST = (flight.FlightError, pa.ArrowException, OSError)
_OPTIONS = flight.FlightCallOptions(timeout=_STATUS_SECONDS)
_T = TypeVar("_T")


class EngineClient:
    """The connection of this process to the engine of one spec; threads may share it."""

    def __init__(self, spec: EngineSpec, start_timeout: float) -> None:
        self.spec = spec
        self.start_timeout = start_timeout  # seconds, of every start from now on
        self._lock = threading.Lock()
        self._state: EngineState | None = None
        self._flight: flight.FlightClient | None = None

    def stream(self, header: StreamOpen) -> AnswerStream:
        """Opens a stream of rows that share ``header``. Close it: that cancels what is unanswered."""
        return AnswerStream(self, header)

    def status(self) -> EngineStatus:
        """The engine's status; starts it if need be. Raises what ``connect`` raises."""
        try:
            return ask(self.channel(), _STATUS_SECONDS)
        except _LOST:
            return ask(self.reconnect(), _STATUS_SECONDS)

    def window(self, request: WindowRequest) -> int:
        """How many rows a task may ask next; 0: the limit is reached. Raises what ``connect`` raises.

        An engine that is lost is started and asked again: what the request tells are totals.
        """
        try:
            return _window(self.channel(), request)
        except _LOST:
            return _window(self.reconnect(), request)

    def channel(self) -> flight.FlightClient:
        """The Flight client of the latest connection; the engine behind it may have ended."""
        with self._lock:
            if self._flight is not None:
                return self._flight
        return self.reconnect()

    def reconnect(self) -> flight.FlightClient:
        """Finds the engine anew and starts it if it has ended. Raises what ``launch.ensure`` raises."""
        with self._lock:
            state = launch.ensure(self.spec, self.start_timeout)
            if self._flight is None or self._state != state:
                self._state = state
                self._flight = connection(state.socket)
            return self._flight

    def log(self) -> tuple[str, str]:
        """The path of the engine's log and the last lines of it."""
        folder = folders.engine_folder(process.owner(), self.spec.key)
        offset = 0 if self._state is None else self._state.log_offset
        return str(folder.log), folder.log_tail(offset)


_clients: dict[tuple[int, str], EngineClient] = {}  # by process (a fork must not share connections) and spec
_listed: dict[str, flight.FlightClient] = {}  # connections of list_engines, by socket
_connecting = threading.Lock()
_listing = threading.Lock()


def connect(spec: EngineSpec, start_timeout: float = 600.0) -> EngineClient:
    """The engine of this executor and ``spec``, ready to answer; the first caller starts it.

    ``start_timeout`` is in seconds. Raises LLM_ENGINE_START_FAILED with the end of the engine's log,
    LLM_ENGINE_FOLDER_UNSAFE, or what the engine itself could not do, for example LLM_MODEL_NOT_FOUND.
    """
    with _connecting:
        client = _clients.setdefault((os.getpid(), spec.key), EngineClient(spec, start_timeout))
        client.start_timeout = start_timeout
    client.status()
    return client


def list_engines() -> list[EngineStatus]:
    """The engines of this user on this host that answer, of whatever executor or model."""
    return _ask_all(lambda client: ask(client, timeout=2.0))


def clear_caches() -> int:
    """Tells the engines of this user on this host to forget the answers in memory; how many did."""
    return len(_ask_all(lambda client: list(client.do_action(flight.Action("clear_cache", b""), _OPTIONS))))


def _ask_all(question: Callable[[flight.FlightClient], _T]) -> list[_T]:
    found = []
    with _listing:
        sockets = {state.socket for folder in folders.all_folders() if (state := _living(folder)) is not None}
        for gone in _listed.keys() - sockets:
            _listed.pop(gone).close()
        for socket in sorted(sockets):
            client = _listed.setdefault(socket, connection(socket))
            try:
                found.append(question(client))
            except _LOST:
                _listed.pop(socket).close()
    return found


def _window(client: flight.FlightClient, request: WindowRequest) -> int:
    (result,) = client.do_action(flight.Action("window", msgspec.json.encode(request)), _OPTIONS)
    return msgspec.json.decode(result.body.to_pybytes(), type=WindowGrant).rows


def _living(folder: EngineFolder) -> EngineState | None:
    state = folder.state()
    return state if state is not None and os.path.exists(state.socket) else None
