"""The service in one process, over a fake engine: a real server on a real socket, real Flight streams, no model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.request import Completion, Constraint, FinishReason, Request, TokenIds
from spark_llm.engine.service import client as clients
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.folder import EngineState
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.process import owner
from spark_llm.engine.service.protocol import ANSWER_SCHEMA, StreamOpen, request_rows
from spark_llm.engine.service.results import Results
from spark_llm.engine.service.server import EngineServer
from spark_llm.errors import LlmError


class FakeText:
    """Tokens are the UTF-8 bytes of a row's text; a row whose text is "unreadable" cannot be encoded."""

    def __init__(self) -> None:
        self.holding, self.held = threading.Event(), threading.Event()  # an unreadable batch waits for ``held``
        self.held.set()

    def encode_rows(
        self, header: StreamOpen, batch: pa.RecordBatch
    ) -> tuple[list[TokenIds], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rows = batch.column("segments").to_pylist()
        if ["unreadable"] in rows:
            self.holding.set()
            self.held.wait(5)
            raise LlmError("LLM_CHAT_TEMPLATE_INVALID", model="fake", reason="unreadable")
        ids = [np.frombuffer("".join(row).encode(), np.uint8).astype(np.int32) for row in rows]
        starts = [["".join(row[:n]).encode() for row in rows] for n in (1, header.shared_segments)]
        return ids, *(np.array([len(start) for start in row], np.int64) for row in starts)

    def decode(self, outputs: list[list[int]], stop: tuple[str, ...]) -> list[str]:
        return [bytes(output).decode() for output in outputs]

    def constrain(self, system: str | None, constraint: Constraint) -> Labels:
        if constraint.kind != "choices":
            raise LlmError("LLM_INVALID_CONSTRAINT", kind=constraint.kind, reason="the fake knows choices only")
        return Labels(constraint.choices, [text.encode() for text in constraint.choices], [0])

    def stop_checker(self, stop: tuple[str, ...]) -> Callable[[Sequence[int]], bool] | None:
        return None


@dataclass
class FakeStats:
    tokens: int = 0
    waiting: int = 0
    running: int = 0
    free_pages: int = 10
    total_pages: int = 10
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0


@dataclass
class FakeConfig:
    name: str = "fake"


class FakeEngine:
    """Answers a prompt by its reverse, ``batch`` rows a step; rows that hold "wait" stay until ``released``."""

    def __init__(self, batch: int = 100) -> None:
        self.text = FakeText()
        self.dtype = "none"
        self.model_config = FakeConfig()
        self.batch = batch
        self.rows: dict[int, Request] = {}
        self.seen: list[Request] = []
        self.cancelled: list[int] = []
        self.released = threading.Event()
        self.broken = False
        self.threads: set[int] = set()
        self.streams: dict[int, str] = {}

    def open(self, stream: int, query: str) -> None:
        self.threads.add(threading.get_ident())
        self.streams[stream] = query

    def close(self, stream: int) -> None:
        self.threads.add(threading.get_ident())
        del self.streams[stream]

    def watch_evictions(self, evicted: Callable[[bytes, int, int], None]) -> None:
        self.evicted = evicted

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        self.rows[request.id] = request
        self.seen.append(request)

    def cancel(self, ids: Iterable[int]) -> None:
        self.threads.add(threading.get_ident())
        for request_id in ids:
            self.cancelled.append(request_id)
            del self.rows[request_id]

    def clients(self) -> dict[str, Any]:
        return {}

    def has_work(self) -> bool:
        return any(self._ready(request) for request in self.rows.values())

    def step(self) -> list[Completion]:
        self.threads.add(threading.get_ident())
        if self.broken:
            raise RuntimeError("the fake engine is broken")
        ready = [request for request in self.rows.values() if self._ready(request)][: self.batch]
        return [self._answer(self.rows.pop(request.id)) for request in ready]

    def stats(self) -> FakeStats:
        return FakeStats(waiting=len(self.rows))

    def _ready(self, request: Request) -> bool:
        return self.released.is_set() or b"wait" not in bytes(request.prompt.astype(np.uint8))

    def _answer(self, request: Request) -> Completion:
        n = len(request.prompt)
        if n > 1000:
            error = (
                "LLM_CONTEXT_LENGTH_EXCEEDED",
                {"excess": f"The prompt has {n} tokens", "limit": "1000", "remedy": "Shorten it"},
            )
            return Completion(request.id, [], FinishReason.ERROR, 0, 0, 0, error=error)
        output = bytes(request.prompt.astype(np.uint8)).decode()[::-1].encode()
        cached = min(5, n)
        if isinstance(request.constraint, Labels):  # the choice whose first letter is the prompt's
            text = next(text for text in request.constraint.choices if ord(text[0]) == request.prompt[0])
            return Completion(
                request.id, [ord(text[0])], FinishReason.STOP, n, cached, n - cached, text=text, confidence=0.75
            )
        return Completion(
            request.id, list(output), FinishReason.STOP, n, cached, n - cached,
            instruction_tokens=request.instruction_tokens,
        )  # fmt: skip


@dataclass
class Service:
    engine: FakeEngine
    client: EngineClient
    fatal: list[BaseException]
    failed: threading.Event
    shutdown: threading.Event
    results: Results


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    engine, fatal, failed, shutdown = FakeEngine(), [], threading.Event(), threading.Event()  # type: ignore[var-annotated]

    def on_fatal(error: BaseException) -> None:
        fatal.append(error)
        failed.set()

    loop = EngineLoop(engine, on_fatal)  # type: ignore[arg-type]
    loop.start()
    socket = str(tmp_path / "s")
    state = EngineState(process=owner(), socket=socket, model="fake")
    monkeypatch.setattr(clients.launch, "ensure", lambda spec, timeout: state)
    with EngineServer(socket, loop, engine.text, 1, shutdown.set):  # type: ignore[arg-type]
        yield Service(engine, EngineClient(EngineSpec(), 10.0), fatal, failed, shutdown, loop.results)
        engine.released.set()


def batch_of(
    rows: dict[int, list[str]],
    seeds: list[int | None] | None = None,
    keys: list[bytes | None] | None = None,
    choices: list[list[str] | None] | None = None,
) -> pa.RecordBatch:
    """A window as the UDF builds it: every segment once, in this batch's own dictionary."""
    flat = [segment for row in rows.values() for segment in row]
    encoded = pa.array(flat, pa.utf8()).dictionary_encode()
    offsets = np.cumsum([0] + [len(row) for row in rows.values()])
    segments = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), encoded)
    return request_rows(list(rows), segments, seeds=seeds, keys=keys, choices=choices)


def answers(stream: clients.AnswerStream) -> dict[int, dict[str, object]]:
    found: dict[int, dict[str, object]] = {}
    while (batch := stream.receive()) is not None:
        assert batch.schema == ANSWER_SCHEMA
        found |= {row["id"]: row for row in batch.to_pylist()}
    return found


def wait_until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    tick = threading.Event()
    for _ in range(int(timeout / 0.01)):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("the condition did not come true")
