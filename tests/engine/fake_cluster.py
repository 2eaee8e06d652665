"""A cluster in one process: a real coordinator, fake engines with real servers, and a client of tasks for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_service import FakeEngine

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service import client as clients
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.coordinator_protocol import Tls
from spark_llm.engine.service.coordinator_server import CoordinatorServer
from spark_llm.engine.service.dispatch_client import ClusterClient
from spark_llm.engine.service.folder import EngineState
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.process import owner
from spark_llm.engine.service.server import EngineServer


@dataclass
class FakeExecutor:
    """An executor's engine, and the client of its tasks."""

    number: int
    engine: FakeEngine
    server: EngineServer
    own: EngineClient
    client: ClusterClient

    def prompts(self) -> set[str]:
        """What the engine was asked."""
        return {bytes(request.prompt.tolist()).decode() for request in self.engine.seen}


class FakeCluster:
    """Executors join in turn, so that their numbers are known."""

    def __init__(self, folder: Path, policy: str, tls: Tls | None) -> None:
        self.folder = folder
        self.policy = policy
        self.coordinator = CoordinatorServer(tls=tls)
        self.states: dict[str, EngineState] = {}
        self.executors: list[FakeExecutor] = []

    def add(self, batch: int = 100) -> FakeExecutor:
        """One more executor, whose engine has joined and whose client knows the others."""
        number = len(self.executors)
        spec = EngineSpec(threads=number + 1)  # another process, but the same answers
        socket = str(self.folder / f"s{number}")
        engine = FakeEngine(batch)
        loop = EngineLoop(engine, lambda error: None)  # type: ignore[arg-type]
        loop.start()
        server = EngineServer(socket, loop, engine.text, 1, lambda: None)  # type: ignore[arg-type]
        self.states[spec.key] = EngineState(process=owner(), socket=socket, model="fake")
        own = EngineClient(spec, 10.0)
        found = FakeExecutor(number, engine, server, own, ClusterClient(own, self.coordinator.cluster, self.policy))
        self.executors.append(found)
        found.client.join()
        return found

    def close(self) -> None:
        for executor in self.executors:
            executor.engine.released.set()
        self.coordinator.close()
        for executor in self.executors:
            member = executor.server._member
            if member is not None and member._membership is not None:
                member._membership.leave()
            executor.server.shutdown()


@contextlib.contextmanager
def fake_cluster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, policy: str = "prefix", tls: Tls | None = None
) -> Iterator[FakeCluster]:
    cluster = FakeCluster(folder, policy, tls)
    monkeypatch.setattr(clients.launch, "ensure", lambda spec, timeout: cluster.states[spec.key])
    try:
        yield cluster
    finally:
        cluster.close()
