"""The driver's view of the engines of an application: who is there, and which of them answers which rows.

Bookkeeping only: no sockets, and one thread calls it (``coordinator_server``). Each pool of equal engines has a Router
(``routing``) for each policy in use. Engines come by themselves, as tasks start them; they go when their connection
ends, when they fall silent, or when a task has lost its own; then they return with their next sign of life.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from spark_llm.engine.service.coordinator_protocol import (
    SILENT_SECONDS,
    Beat,
    Dispatch,
    Dispatched,
    EngineList,
    Finished,
    Gone,
    Granted,
    Lost,
    Register,
    Stopped,
    Subscribe,
    WindowAsk,
)
from spark_llm.engine.service.limits import Limits
from spark_llm.engine.service.routing import Router

log = logging.getLogger("spark_llm.coordinator")

_DISTRUST_SECONDS = 2.0  # after a task lost an engine: a beat that was already on its way proves nothing


class Peer(Protocol):
    """A connection, to which messages can be pushed."""

    def push(self, message: msgspec.Struct) -> None:
        """Never raises and never waits."""


@dataclass(eq=False)
class _Engine:
    register: Register
    peer: Peer
    beat_at: float
    lost_at: float | None = None  # not None: it is not used


@dataclass(eq=False)
class _Task:
    pools: set[str] = field(default_factory=set)
    shares: dict[int, tuple[Router, int]] = field(default_factory=dict)  # open ones: the router, rows left


@dataclass
class Cost:
    """What dispatching has cost so far: seconds within the router, of this many requests, groups and rows."""

    seconds: float = 0.0
    requests: int = 0
    groups: int = 0
    rows: int = 0


class Coordinator:
    """See the module. ``cost`` tells what it takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.cost = Cost()
        self._clock = clock
        self._engines: dict[str, _Engine] = {}
        self._tasks: dict[Peer, _Task] = {}
        self._routers: dict[tuple[str, str], Router] = {}  # by pool and policy
        self._limits = Limits()
        self._asking: dict[tuple[str, str], set[Peer]] = {}  # by query and node, who asks for windows

    # ---- engines

    def register(self, told: Register, peer: Peer) -> None:
        """An engine is there, or is back on another connection."""
        before = self._engines.pop(told.engine, None)
        self._engines[told.engine] = _Engine(told, peer, self._clock())
        if before is None or before.lost_at is not None:
            self._use(told)
        log.info("engine %s joined: pid %d at %s", told.engine, told.pid, told.endpoint.address)
        self._announce(told.pool)

    def beat(self, engine: str, beat: Beat) -> None:
        """An engine shows life."""
        known = self._engines.get(engine)
        if known is None:
            return
        known.beat_at = self._clock()
        if known.lost_at is not None:
            if known.beat_at - known.lost_at < _DISTRUST_SECONDS:
                return
            known.lost_at = None
            self._use(known.register)
            self._announce(known.register.pool)
        if beat.evicted:
            for router in self._routers_of(known.register.pool):
                router.evicted(engine, beat.evicted)

    def engine_gone(self, engine: str, peer: Peer) -> None:
        """The engine's connection has ended."""
        known = self._engines.get(engine)
        if known is not None and known.peer is peer:  # else it is back on another one
            del self._engines[engine]
            self._drop(known, "its connection to the driver ended")

    def look(self) -> None:
        """Takes engines for lost that have been silent for too long; to be called now and then."""
        now = self._clock()
        for name, known in list(self._engines.items()):
            silence = now - known.beat_at
            if silence > SILENT_SECONDS:
                del self._engines[name]
                self._drop(known, f"silent for {silence:.0f} s")
                gone = Gone(name, f"the engine at {known.register.endpoint.address} is silent")
                for peer, task in self._tasks.items():
                    if known.register.pool in task.pools:
                        peer.push(gone)

    # ---- tasks

    def task_came(self, peer: Peer) -> None:
        """A task is connected."""
        self._tasks[peer] = _Task()

    def task_gone(self, peer: Peer) -> None:
        """The task's connection has ended: nobody waits for what it asked."""
        for share, (router, left) in self._tasks.pop(peer, _Task()).shares.items():
            router.finished(share, left, 0, 0)
        for key in [key for key, peers in self._asking.items() if peer in peers]:
            self._asking[key].discard(peer)
            if not self._asking[key]:
                del self._asking[key]

    def subscribe(self, asked: Subscribe, peer: Peer) -> EngineList:
        """The engines of the pool; the task will be told of changes."""
        self._tasks[peer].pools.add(asked.pool)
        return self._list(asked.pool, asked.ask)

    def dispatch(self, asked: Dispatch, peer: Peer) -> Dispatched:
        """Who answers the groups' rows."""
        begun = time.perf_counter()
        router = self._router(asked.pool, asked.policy)
        if not router.engines:
            return Dispatched(asked.ask, [])
        task, told = self._tasks[peer], []
        for group in asked.groups:
            shares = router.dispatch(group)
            task.shares.update((share.id, (router, share.group.rows)) for share in shares)
            told.append([(share.id, share.engine, share.group.rows) for share in shares])
        cost = self.cost
        cost.seconds += time.perf_counter() - begun
        cost.requests += 1
        cost.groups += len(asked.groups)
        cost.rows += sum(group.rows for group in asked.groups)
        return Dispatched(asked.ask, told)

    def finished(self, told: Finished, peer: Peer) -> None:
        """Rows are done."""
        begun = time.perf_counter()
        shares = self._tasks[peer].shares
        for done in told.done:
            known = shares.get(done.share)
            if known is None:
                continue
            router, left = known
            router.finished(done.share, done.rows, done.computed_tokens, done.output_tokens)
            if left > done.rows:
                shares[done.share] = (router, left - done.rows)
            else:
                del shares[done.share]
        self.cost.seconds += time.perf_counter() - begun

    def lost(self, told: Lost) -> None:
        """A task has lost its connection to an engine: it is not used until it shows life."""
        known = self._engines.get(told.engine)
        if known is not None and known.lost_at is None:
            known.lost_at = self._clock()
            self._drop(known, "a task lost its connection")

    def window(self, asked: WindowAsk, peer: Peer) -> Granted:
        """Rows of the task's next window; all tasks of the node are told when its limit is reached."""
        request = asked.request
        key = (request.query, request.node)
        if request.ended:
            self._asking.get(key, set()).discard(peer)
        else:
            self._asking.setdefault(key, set()).add(peer)
        rows = self._limits.grant(request)
        if not rows:
            for asking in self._asking.pop(key, ()):
                asking.push(Stopped(*key))
        return Granted(asked.ask, rows)

    # ----

    def _use(self, engine: Register) -> None:
        for router in self._routers_of(engine.pool):
            router.engine_added(engine.engine)

    def _drop(self, known: _Engine, reason: str) -> None:
        name, pool = known.register.engine, known.register.pool
        log.warning("engine %s (pid %d) is not used any more: %s", name, known.register.pid, reason)
        for router in self._routers_of(pool):
            router.engine_lost(name)  # the tasks that wait for its rows dispatch them anew
        self._announce(pool)

    def _announce(self, pool: str) -> None:
        told = self._list(pool)
        for peer, task in self._tasks.items():
            if pool in task.pools:
                peer.push(told)

    def _list(self, pool: str, ask: int = -1) -> EngineList:
        return EngineList(pool, {e.engine: e.endpoint for e in self._used(pool)}, ask)

    def _used(self, pool: str) -> list[Register]:
        known = self._engines.values()
        return [e.register for e in known if e.register.pool == pool and e.lost_at is None]

    def _routers_of(self, pool: str) -> list[Router]:
        return [router for (of, _), router in self._routers.items() if of == pool]

    def _router(self, pool: str, policy: str) -> Router:
        router = self._routers.get((pool, policy))
        if router is None:
            router = self._routers[pool, policy] = Router(policy)
            for engine in self._used(pool):
                router.engine_added(engine.engine)
        return router
