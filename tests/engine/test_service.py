"""The service in one process: a server over a fake engine, reached through real sockets and Flight streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.request import Completion, FinishReason, Request, SamplingParams, TokenIds
from spark_llm.engine.service import client as clients
from spark_llm.engine.service import probe
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.folder import EngineState
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.process import ProcessId, owner
from spark_llm.engine.service.protocol import ANSWER_SCHEMA, REQUEST_SCHEMA, StreamOpen
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

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        self.rows[request.id] = request
        self.seen.append(request)

    def cancel(self, ids: Iterable[int]) -> None:
        self.threads.add(threading.get_ident())
        for request_id in ids:
            self.cancelled.append(request_id)
            del self.rows[request_id]

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
            error = ("LLM_CONTEXT_LENGTH_EXCEEDED", {"length": str(n), "max_tokens": "1", "limit": "1000"})
            return Completion(request.id, [], FinishReason.ERROR, 0, 0, 0, error=error)
        output = bytes(request.prompt.astype(np.uint8)).decode()[::-1].encode()
        cached = min(5, n)
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
        yield Service(engine, EngineClient(EngineSpec(), 10.0), fatal, failed, shutdown)
        engine.released.set()


def batch_of(
    rows: dict[int, list[str]], seeds: list[int | None] | None = None, keys: list[bytes | None] | None = None
) -> pa.RecordBatch:
    """A window as the UDF builds it: every segment once, in this batch's own dictionary."""
    flat = [segment for row in rows.values() for segment in row]
    encoded = pa.array(flat, pa.utf8()).dictionary_encode()
    offsets = np.cumsum([0] + [len(row) for row in rows.values()])
    segments = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), encoded)
    columns = [
        pa.array(list(rows), pa.int64()),
        segments,
        pa.array(seeds or [None] * len(rows), pa.int64()),
        pa.array(keys or [None] * len(rows), pa.binary()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=REQUEST_SCHEMA)


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


def test_rows_come_back_with_text_and_counts(service: Service) -> None:
    with service.client.stream(StreamOpen(params=SamplingParams(max_tokens=3), client="me")) as stream:
        stream.send(batch_of({7: ["Say: ", "abc"], 9: ["Say: ", "dé"]}, seeds=[None, 3]))
        found = answers(stream)
    assert {row: found[row]["text"] for row in found} == {7: "cba :yaS", 9: "éd :yaS"}
    assert found[9] == {
        "id": 9, "text": "éd :yaS", "finish_reason": "stop", "error": None, "prompt_tokens": 8,
        "instruction_tokens": 5, "cached_tokens": 5, "cached_instruction_tokens": 5, "computed_tokens": 3,
        "recomputed_tokens": 0, "output_tokens": 8, "folded": False, "stored": False,
    }  # fmt: skip
    assert [(r.seed, r.client, r.params.max_tokens) for r in service.engine.seen] == [(None, "me", 3), (3, "me", 3)]


def test_each_batch_may_bring_another_dictionary(service: Service) -> None:
    with service.client.stream(StreamOpen()) as stream:
        for n in range(20):
            whole = batch_of({10 * n + i: [f"p{n}", f"f{n % 3}", f"x{i}"] for i in range(10)})
            stream.send(whole.slice(0, 4))
            stream.send(whole.slice(4))
        found = answers(stream)
    assert {row: str(found[row]["text"])[::-1] for row in found} == {
        10 * n + i: f"p{n}f{n % 3}x{i}" for n in range(20) for i in range(10)
    }


def test_a_refused_row_is_an_answer_and_spares_the_others(service: Service) -> None:
    with service.client.stream(StreamOpen()) as stream:
        stream.send(batch_of({1: ["a" * 2000], 2: ["b"]}))
        found = answers(stream)
    assert found[2]["text"] == "b"
    assert found[1]["text"] is None
    assert found[1]["finish_reason"] == "error"
    assert str(found[1]["error"]).startswith("[LLM_CONTEXT_LENGTH_EXCEEDED] The prompt has 2000 tokens")


def test_what_stops_the_stream_is_the_clients_error(service: Service) -> None:
    with service.client.stream(StreamOpen()) as stream:
        stream.send(batch_of({1: ["unreadable"]}))
        with pytest.raises(LlmError, match=r"LLM_CHAT_TEMPLATE_INVALID.*unreadable"):
            answers(stream)
    with service.client.stream(StreamOpen(version=99)) as stream:
        stream.send(batch_of({1: ["a"]}))
        with pytest.raises(LlmError, match=r"LLM_INVALID_REQUEST.*protocol 99"):
            answers(stream)
    wait_until(lambda: service.client.status().streams == 0)


def test_closing_a_stream_cancels_its_rows_while_another_goes_on(service: Service) -> None:
    with service.client.stream(StreamOpen(query="other")) as other:
        other.send(batch_of({1: ["wait for me"]}))
        stream = service.client.stream(StreamOpen(query="closed"))
        stream.send(batch_of({i: ["wait"] for i in range(50)}))
        wait_until(lambda: service.client.status().waiting == 51)
        stream.close()
        wait_until(lambda: service.client.status().waiting == 1)
        assert len(service.engine.cancelled) == 50
        with pytest.raises(LlmError, match="LLM_CANCELLED"):
            stream.receive()
        service.engine.released.set()
        other.send(batch_of({2: ["now"]}))  # wakes the loop
        assert set(answers(other)) == {1, 2}
    status = service.client.status()
    assert status.queries["other"] == (2, 2)
    assert status.queries["closed"] == (50, 0)


def test_equal_rows_of_a_query_are_computed_once(service: Service) -> None:
    """In one batch, while they are on their way, and after; in another stream as well as in the same."""
    first, second = (service.client.stream(StreamOpen(query="q")) for _ in range(2))
    with first, second:
        first.send(batch_of({1: ["wait"], 2: ["wait"], 3: ["other"]}, keys=[b"w", b"w", b"o"]))
        wait_until(lambda: len(service.engine.seen) == 2)
        second.send(batch_of({1: ["o", "ther"], 2: ["wait"], 3: ["mine"]}, keys=[b"o", b"w", b"m"]))
        wait_until(lambda: len(service.engine.seen) == 3)
        service.engine.released.set()
        with service.client.stream(StreamOpen()) as other:
            other.send(batch_of({1: ["wake"]}))
            answers(other)
        found = answers(first), answers(second)
    assert [{row: found[n][row]["text"] for row in sorted(found[n])} for n in range(2)] == [
        {1: "tiaw", 2: "tiaw", 3: "rehto"},
        {1: "rehto", 2: "tiaw", 3: "enim"},
    ]
    folded = [row for n in range(2) for row in found[n].values() if row["folded"]]
    assert len(folded) == 3
    for row in folded:
        assert {name: row[name] for name in row if name.endswith("_tokens")} == dict.fromkeys(
            [name for name in row if name.endswith("_tokens")], 0
        )
    status = service.client.status()
    assert (status.queries["q"], status.rows_folded) == ((6, 6), 3)


def test_a_row_that_waits_for_a_closed_stream_is_answered(service: Service) -> None:
    leader = service.client.stream(StreamOpen(query="q"))
    leader.send(batch_of({1: ["wait"], 2: ["wait alone"]}, keys=[b"w", b"a"]))
    wait_until(lambda: len(service.engine.seen) == 2)
    with service.client.stream(StreamOpen(query="q")) as stream:
        stream.send(batch_of({7: ["wait"], 8: ["now"]}, keys=[b"w", b"n"]))
        wait_until(lambda: service.client.status().queries["q"] == (4, 1))
        leader.close()
        wait_until(lambda: bool(service.engine.cancelled))
        assert [bytes(r.prompt.astype(np.uint8)) for r in service.engine.rows.values()] == [b"wait"]
        service.engine.released.set()
        stream.send(batch_of({9: ["wake"]}))
        found = answers(stream)
    assert {row: (found[row]["text"], found[row]["folded"]) for row in found} == {
        7: ("tiaw", False), 8: ("won", False), 9: ("ekaw", False),
    }  # fmt: skip


def test_rows_that_wait_fail_with_the_batch_that_cannot_be_read(service: Service) -> None:
    first, second = (service.client.stream(StreamOpen(query="q")) for _ in range(2))
    service.engine.text.held = threading.Event()
    with first, second:
        first.send(batch_of({1: ["unreadable"]}, keys=[b"u"]))
        wait_until(lambda: service.engine.text.holding.is_set())
        second.send(batch_of({1: ["unreadable"], 2: ["b"]}, keys=[b"u", None]))
        assert second.receive()["id"].to_pylist() == [2]  # type: ignore[index]
        service.engine.text.held.set()
        for stream in (first, second):
            with pytest.raises(LlmError, match="LLM_CHAT_TEMPLATE_INVALID"):
                answers(stream)


def test_requests_carry_what_is_known_of_rows_to_come(service: Service) -> None:
    header = StreamOpen(query="q", later_calls=2, shared_segments=2)
    with service.client.stream(header) as stream:
        stream.send(batch_of({i: [*row, "ask"] for i, row in enumerate([["a", "bc"], ["a", "bd"], ["b", "d"]])}))
        answers(stream)
        hints = [request.hints for request in service.engine.seen]
        assert [(h.shared_next, h.later_calls, h.shared_tokens) for h in hints if h] == [
            (2, 2, 3),
            (0, 2, 3),
            (0, 2, 2),
        ]
        assert {(h.stream, h.query) for h in hints if h} == set(service.engine.streams.items())
    wait_until(lambda: not service.engine.streams)


def test_a_half_closed_stream_is_answered(service: Service) -> None:
    """Any Flight client may say that it has sent everything and still wait for answers."""
    channel = service.client.channel()
    writer, reader = channel.do_exchange(flight.FlightDescriptor.for_command(b"{}"))
    writer.begin(REQUEST_SCHEMA)
    writer.write_batch(batch_of({1: ["wait"], 2: ["b"]}))
    writer.done_writing()
    assert reader.read_chunk().data.column("id").to_pylist() == [2]
    service.engine.released.set()
    with service.client.stream(StreamOpen()) as stream:
        stream.send(batch_of({1: ["wake"]}))
    assert reader.read_chunk().data.column("id").to_pylist() == [1]
    with pytest.raises(StopIteration):
        reader.read_chunk()


def test_empty_and_single_rows(service: Service) -> None:
    with service.client.stream(StreamOpen()) as stream:
        assert stream.receive() is None
        stream.send(batch_of({}))
        assert stream.receive() is None
        stream.send(batch_of({5: ["ab"]}))
        assert set(answers(stream)) == {5}
        stream.send(batch_of({6: ["cd"]}))
        assert set(answers(stream)) == {6}


def test_ids_are_used_once(service: Service) -> None:
    with service.client.stream(StreamOpen()) as stream:
        stream.send(batch_of({1: ["wait"]}))
        with pytest.raises(ValueError, match="unique"):
            stream.send(batch_of({1: ["again"]}))
    with pytest.raises(ValueError, match="closed"):
        stream.send(batch_of({2: ["late"]}))


def test_much_can_be_sent_before_anything_is_received(service: Service) -> None:
    """Neither side may wait for the other when both directions are full."""
    service.engine.batch = 2000
    with service.client.stream(StreamOpen()) as stream:
        for n in range(20):
            stream.send(batch_of({1000 * n + i: [f"{i}" + "x" * 900] for i in range(1000)}))
        assert len(answers(stream)) == 20_000


def test_many_streams_at_once_get_their_own_answers(service: Service) -> None:
    results: dict[int, set[object]] = {}

    def use(k: int) -> None:
        with service.client.stream(StreamOpen(query=f"q{k}")) as stream:
            for n in range(3):
                stream.send(batch_of({100 * n + i: [f"{k}-", f"{n}-{i}"] for i in range(100)}))
            results[k] = {str(row["text"])[::-1] for row in answers(stream).values()}

    threads = [threading.Thread(target=use, args=(k,)) for k in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: {f"{k}-{n}-{i}" for n in range(3) for i in range(100)} for k in range(24)}
    assert len(service.engine.threads) == 1, "one thread owns the engine"


def test_a_broken_engine_is_fatal(service: Service) -> None:
    service.engine.broken = True
    with service.client.stream(StreamOpen()) as stream:
        stream.send(batch_of({1: ["a"]}))
        assert service.failed.wait(5)
    assert "broken" in str(service.fatal[0])


def test_actions(service: Service) -> None:
    channel = service.client.channel()
    assert {name for name, _ in channel.list_actions()} == {"status", "window", "clear_cache", "shutdown"}
    status = probe.ask(channel, 5.0)
    assert (status.model, status.dtype, status.owner, status.streams) == ("fake", "none", 1, 0)
    with pytest.raises(flight.FlightError, match="unknown action"):
        list(channel.do_action(flight.Action("nonsense", b"")))
    list(channel.do_action(flight.Action("shutdown", b"")))
    assert service.shutdown.wait(5)


def test_process_ids_tell_reused_pids_apart() -> None:
    me = owner()
    assert me.alive
    assert not ProcessId(me.pid, me.start - 1).alive
    assert ProcessId.of(2**22 + 1) is None
