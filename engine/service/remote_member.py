"""The engine's part in a cluster: it listens for tasks of other executors and shows the coordinator that it lives.

Nothing of this runs before a task of the engine's own executor asks for it by the action ``join``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

from spark_llm.engine.service.coordinator_link import Link
from spark_llm.engine.service.coordinator_protocol import (
    BEAT_SECONDS,
    Beat,
    Cluster,
    Endpoint,
    Join,
    Joined,
    Register,
    Registered,
    ToEngine,
)

log = logging.getLogger("member")

JOIN_SECONDS = 20.0  # that a task waits for the engine to be registered
_RETRY_SECONDS = 2.0


class Listening(Protocol):
    """A Flight server on TCP, which serves from construction on."""

    port: int

    def shutdown(self) -> None: ...


class Member:
    """Joins clusters, one at a time: a later application of the same executor takes the place of the one before.

    listen(host, cluster): starts the server at an address of this host. evicted: hashes of prefixes that the engine has
    evicted since it was last called.
    """

    def __init__(self, listen: Callable[[str, Cluster], Listening], evicted: Callable[[], list[int]] = list) -> None:
        self._listen = listen
        self._evicted = evicted
        self._lock = threading.Lock()
        self._membership: _Membership | None = None

    @property
    def address(self) -> str:
        """Where it listens, "": nowhere (yet)."""
        now = self._membership
        return "" if now is None or now.endpoint is None else now.endpoint.address

    def join(self, request: Join) -> Joined:
        """Returns once the engine is registered; at once where it already is. Raises OSError if that fails."""
        with self._lock:
            now = self._membership
            if now is None or now.request != request:
                if now is not None:
                    now.leave()
                now = self._membership = _Membership(request, self._listen, self._evicted)
        if not now.tried.wait(JOIN_SECONDS) or not now.is_registered:
            raise ConnectionError(f"the engine cannot register with the driver: {now.error or 'no reply'}")
        return Joined(now.engine)


class _Membership:
    """One cluster's: a thread that stays connected to its coordinator.

    engine: its name there. tried: it has registered, or failed to once, by ``error``; it goes on trying.
    """

    def __init__(
        self, request: Join, listen: Callable[[str, Cluster], Listening], evicted: Callable[[], list[int]]
    ) -> None:
        self.request = request
        self.engine = os.urandom(8).hex()
        self.tried = threading.Event()
        self.is_registered = False
        self.error: OSError | None = None
        self._listen = listen
        self._evicted = evicted
        self._server: Listening | None = None
        self.endpoint: Endpoint | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="member", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Listens no more."""
        self._leaving.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._leaving.is_set():
            try:
                self._stay()
            except OSError as error:
                self.error = error
                self.tried.set()
                log.warning("no connection to the driver: %s", error)
                self._leaving.wait(_RETRY_SECONDS)
        if self._server is not None:
            self._server.shutdown()

    def _stay(self) -> None:
        """Registers, and beats until the connection ends."""
        cluster = self.request.cluster
        link = Link(cluster, "engine", ToEngine, self._on_push)
        try:
            if self._server is None:
                # the address by which the driver is reached is one by which the driver's network reaches this host
                self._server = self._listen(link.host, cluster)
                self.endpoint = Endpoint(link.host, self._server.port)
                log.info("listens for tasks of other executors at %s", self.endpoint.address)
            assert self.endpoint is not None
            link.tell(Register(self.engine, self.request.pool, self.endpoint, os.getpid()))
            while not self._leaving.wait(BEAT_SECONDS):
                link.tell(Beat(self._evicted()))
        finally:
            link.close()

    def _on_push(self, message: Registered) -> None:
        self.is_registered = True
        self.tried.set()
