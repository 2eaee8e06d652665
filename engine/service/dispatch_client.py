"""How a task reaches all engines of its application that give the same answers: its executor's own, and the others.

Its own engine is started as ever (``client``) and told to join the cluster; where the others are, and which rows go to
which, the coordinator says. While there is one engine, rows go there and nobody is asked. Where the driver cannot be
reached, rows go to the task's own engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service import client as own_client
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.coordinator_link import Link
from spark_llm.engine.service.coordinator_protocol import (
    Cluster,
    Dispatch,
    Dispatched,
    Done,
    Endpoint,
    EngineList,
    Finished,
    Gone,
    Join,
    Joined,
    Lost,
    Stopped,
    Subscribe,
    ToTask,
    WindowAsk,
    pool_of,
)
from spark_llm.engine.service.dispatch import DispatchedStream
from spark_llm.engine.service.dispatch_groups import Ints, SegmentTable
from spark_llm.engine.service.protocol import StreamOpen, WindowRequest
from spark_llm.engine.service.remote import RemoteEngine
from spark_llm.engine.service.routing import PrefixGroup

log = logging.getLogger(__name__)

OWN = ""  # the own engine's name here: the coordinator's changes when it is started again
_JOIN_SECONDS = 30.0
_BROKEN = (flight.FlightError, pa.ArrowException, OSError)


class Placed(NamedTuple):
    """Rows (int64, positions in a batch) that ``engine`` is to answer. share: by which their end is told, -1: nobody
    wants to know."""

    share: int
    engine: str
    rows: Ints


class ClusterClient:
    """The engines of one pool for this process; an ``Answerer`` (``answers``). Threads may share it."""

    def __init__(self, own: EngineClient, cluster: Cluster, policy: str) -> None:
        self._own = own
        self._cluster = cluster
        self._policy = policy
        self._pool = pool_of(own.spec)
        self._lock = threading.Lock()
        self._joining = threading.Lock()
        self._own_name = ""
        self._engines: dict[str, Endpoint] = {}  # as the coordinator says
        self._seen: dict[str, Endpoint] = {}  # and has ever said
        self._unreachable: set[str] = set()
        self._remotes: dict[Endpoint, RemoteEngine] = {}
        self._streams: weakref.WeakSet[DispatchedStream] = weakref.WeakSet()
        self._link: Link | None = None

    def join(self) -> None:
        """Makes sure that the own engine is a member and that the coordinator tells of others.

        Raises what starting an engine raises. Without the driver, rows go to the own engine.
        """
        with self._joining:
            request = flight.Action("join", msgspec.json.encode(Join(self._cluster, self._pool)))
            try:
                options = flight.FlightCallOptions(timeout=_JOIN_SECONDS)
                (reply,) = self._own.channel().do_action(request, options)
                self._own_name = msgspec.json.decode(reply.body.to_pybytes(), type=Joined).engine
                if self._link is None or not self._link.is_open:
                    self._link = Link(self._cluster, "task", ToTask, self._on_push, self._on_end)
                    self._on_push(self._link.ask(lambda ask: Subscribe(ask, self._pool)))
            except _BROKEN as error:
                log.warning("rows go to the engine of this executor only: %s", error)

    def stream(self, header: StreamOpen) -> DispatchedStream:
        """Opens a stream of rows that share ``header``. Close it: that cancels what is unanswered."""
        return DispatchedStream(self, header)

    def window(self, request: WindowRequest) -> int:
        """How many rows a task may ask next, counted over all engines; 0: the limit is reached."""
        link = self._link
        if link is not None:
            try:
                rows: int = link.ask(lambda ask: WindowAsk(ask, request)).rows
                return rows
            except OSError as error:
                log.warning("the limit is counted by the engine of this executor only: %s", error)
        return self._own.window(request)

    # ---- for its streams

    @property
    def known_engines(self) -> int:
        """How many engines there are."""
        return len(self._engines)

    def attach(self, stream: DispatchedStream) -> None:
        """The stream is told from now on what the coordinator tells."""
        with self._lock:
            self._streams.add(stream)

    def detach(self, stream: DispatchedStream) -> None:
        """It is not told any more."""
        with self._lock:
            self._streams.discard(stream)

    def place(self, batch: pa.RecordBatch, header: StreamOpen, output_tokens: float) -> list[Placed]:
        """Which engines are to answer the rows of a REQUEST_SCHEMA batch, whose answers have about so many tokens."""
        with self._lock:
            engines = [self._alias(engine) for engine in self._engines if engine not in self._unreachable]
            link = self._link
        if len(engines) > 1 and link is not None:
            try:
                return self._dispatch(link, batch, header, output_tokens)
            except OSError as error:
                log.warning("rows go to the engine of this executor: %s", error)
                engines.clear()
        return [Placed(-1, engines[0] if engines else OWN, np.arange(batch.num_rows))]

    def reach(self, engine: str) -> EngineClient | RemoteEngine:
        """The connection to an engine, which may have ended. The own one is started if it has, and joins anew."""
        with self._lock:
            endpoint = self._seen.get(engine)
            if endpoint is not None:
                if endpoint not in self._remotes:
                    self._remotes[endpoint] = RemoteEngine(self._own.spec, self._cluster, endpoint)
                return self._remotes[endpoint]
            is_there = self._own_name in self._engines
        if not is_there:
            self._own.reconnect()
            self.join()
        return self._own

    def lost(self, engine: str, taken_in: bool) -> None:
        """An engine was lost. taken_in: it was there, so it has ended; else it may be out of reach from here."""
        with self._lock:
            name = self._own_name if engine == OWN else engine
            self._engines.pop(name, None)
            if not taken_in and engine != OWN:
                self._unreachable.add(engine)
            link = self._link
        if taken_in or engine == OWN:
            self._tell(link, Lost(name))

    def finished(self, done: list[Done]) -> None:
        """Rows of shares are done."""
        self._tell(self._link, Finished(self._pool, self._policy, done))

    # ----

    def _dispatch(self, link: Link, batch: pa.RecordBatch, header: StreamOpen, output_tokens: float) -> list[Placed]:
        table = SegmentTable.of(batch, header.system)
        runs = table.runs()
        groups = [
            PrefixGroup(
                client=header.client,
                weight=header.client_weight,
                path=run.path,
                rows=run.end - run.start,
                own_tokens=table.own_tokens(run),
                output_tokens=output_tokens,
            )
            for run in runs
        ]
        reply: Dispatched = link.ask(lambda ask: Dispatch(ask, self._pool, self._policy, groups))
        if not reply.shares:
            raise ConnectionError("the coordinator knows no engine")
        placed = []
        for run, shares in zip(runs, reply.shares, strict=True):
            at = run.start
            for share, engine, rows in shares:
                to = OWN if engine in self._unreachable else self._alias(engine)
                placed.append(Placed(share, to, np.arange(at, at + rows)))
                at += rows
        return placed

    def _alias(self, engine: str) -> str:
        return OWN if engine == self._own_name else engine

    @staticmethod
    def _tell(link: Link | None, message: msgspec.Struct) -> None:
        if link is not None:
            with contextlib.suppress(OSError):  # then the coordinator knows that this task is gone
                link.tell(message)

    # ---- the link's thread

    def _on_push(self, message: Any) -> None:
        match message:
            case EngineList():
                with self._lock:
                    self._engines = dict(message.engines)
                    self._seen |= message.engines
                    self._unreachable &= message.engines.keys()
            case Gone():
                with self._lock:
                    streams = list(self._streams)
                for stream in streams:
                    stream.abandon(self._alias(message.engine), message.reason)
            case Stopped():
                with self._lock:
                    streams = list(self._streams)
                for stream in streams:
                    if (stream.header.query, stream.header.node) == (message.query, message.node):
                        stream.stop()

    def _on_end(self) -> None:
        with self._lock:
            self._engines = {}
        log.warning("the connection to the driver has ended: rows go to the engine of this executor")


_clients: dict[tuple[int, str, str, str], ClusterClient] = {}  # by process, spec, key of the cluster, policy
_connecting = threading.Lock()


def connect(spec: EngineSpec, start_timeout: float, cluster: Cluster, policy: str) -> ClusterClient:
    """The engines for ``spec`` of the application; the first caller of an executor starts its engine.

    Raises what ``client.connect`` raises.
    """
    own = own_client.connect(spec, start_timeout)
    key = (os.getpid(), spec.key, cluster.key, policy)
    with _connecting:
        client = _clients.setdefault(key, ClusterClient(own, cluster, policy))
    client.join()
    return client
