"""Streams over several engines: who answers which rows, and what becomes of them when an engine goes. Fake engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_cluster import FakeCluster, FakeExecutor, fake_cluster
from fake_service import answers, batch_of, wait_until

from spark_llm.engine.prefix import sort_key
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service.coordinator_protocol import Gone
from spark_llm.engine.service.protocol import StreamOpen, WindowRequest
from spark_llm.engine.service.stream import LimitReached
from spark_llm.errors import LlmError

HEADER = StreamOpen(query="q", params=SamplingParams(max_tokens=8))
Make = Callable[..., FakeCluster]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with fake_cluster(tmp_path, monkeypatch) as made:
        yield made


def pair(cluster: FakeCluster) -> tuple[FakeExecutor, FakeExecutor]:
    first, second = cluster.add(), cluster.add()
    wait_until(lambda: first.client.known_engines == 2)
    return first, second


def rows(groups: int, size: int, word: str = "") -> dict[int, list[str]]:
    """Groups whose rows share their second segment."""
    return {k: ["ask\n", f"group {k // size:02d}\n", f"{word}{k}"] for k in range(groups * size)}


def texts(asked: dict[int, list[str]]) -> dict[int, str]:
    """What an engine answers: the prompt's reverse."""
    return {row: "".join(segments)[::-1] for row, segments in asked.items()}


def test_groups_are_spread_whole_and_every_row_is_answered_once(cluster: FakeCluster) -> None:
    first, second = pair(cluster)
    asked = rows(10, 12)
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of(asked))
        got: list[int] = []
        while (batch := stream.receive()) is not None:
            got += batch.column("id").to_pylist()
        assert sorted(got) == list(asked)
    seen = [executor.prompts() for executor in (first, second)]
    assert sum(map(len, seen)) == len(asked)
    assert all(seen), "both engines had work"
    groups = [{prompt.split("\n")[1] for prompt in prompts} for prompts in seen]
    assert not groups[0] & groups[1], "no group was computed twice"
    # the next window's groups go where their prefixes are
    with second.client.stream(HEADER) as stream:
        stream.send(batch_of(rows(10, 12, "again ")))
        assert len(answers(stream)) == len(asked)
    assert [{p.split("\n")[1] for p in e.prompts()} for e in (first, second)] == groups


def test_the_coordinator_hears_of_rows_that_are_done_or_given_up(cluster: FakeCluster) -> None:
    first, _ = pair(cluster)
    asked = rows(4, 5) | {100: ["ask\n", "wait\n", "for ever"]}
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of(asked))
        done = 0
        while done < 20:
            done += stream.receive().num_rows
        assert stream.unanswered == 1
    (router,) = cluster.coordinator._coordinator._routers.values()
    wait_until(lambda: all(queued.rows == 0 and queued.service == 0 for queued in router.queued().values()))
    wait_until(lambda: sum(len(executor.engine.cancelled) for executor in cluster.executors) == 1)


def test_the_coordinator_hears_of_prefixes_that_are_evicted(cluster: FakeCluster) -> None:
    first, _ = pair(cluster)
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of(rows(4, 5)))
        assert len(answers(stream)) == 20
    (router,) = cluster.coordinator._coordinator._routers.values()
    assert len(router.holdings) == 5, "the instruction and four groups"
    for executor in cluster.executors:
        for request in executor.engine.seen:
            executor.engine.evicted(sort_key(request.prompt), len("ask\ngroup 0"), len(request.prompt))
    wait_until(lambda: len(router.holdings) == 1)


def test_with_one_engine_the_coordinator_is_not_asked(cluster: FakeCluster) -> None:
    only = cluster.add()
    with only.client.stream(HEADER) as stream:
        stream.send(batch_of(rows(3, 4)))
        assert {row: found["text"] for row, found in answers(stream).items()} == texts(rows(3, 4))
    assert cluster.coordinator.cost.requests == 0


def test_rows_of_a_silent_engine_go_to_the_other_and_none_is_answered_twice(cluster: FakeCluster) -> None:
    first, second = pair(cluster)
    asked = rows(6, 4, "wait ")
    second.engine.released.set()
    with second.client.stream(HEADER) as stream:
        stream.send(batch_of(asked))
        wait_until(lambda: len(first.engine.rows) > 0)
        left = len(first.engine.rows)
        name = next(name for name, endpoint in second.client._engines.items() if endpoint != _own(second))
        for told in (Gone(name, "silent"), Gone("unknown", "silent")):
            second.client._on_push(told)
        got = [row for batch in iter(stream.receive, None) for row in batch.column("id").to_pylist()]
        assert sorted(got) == list(asked)
    assert len(second.engine.seen) == len(asked)
    wait_until(lambda: len(first.engine.cancelled) == left)


def test_a_row_that_loses_its_engine_twice_ends_the_stream(cluster: FakeCluster) -> None:
    engines = [executor.engine for executor in pair(cluster)]
    with cluster.executors[0].client.stream(HEADER) as stream:
        stream.send(batch_of({0: ["wait"]}))
        for times in (1, 2):
            wait_until(lambda times=times: sum(len(engine.seen) for engine in engines) == times)  # type: ignore[misc]
            (engine,) = stream._parts
            stream.abandon(engine, "gone for the test")
            if times == 1:
                stream._recover()  # as receive does
        with pytest.raises(LlmError, match=r"LLM_ENGINE_LOST.*ended 2 times.*gone for the test.*Unanswered rows: 1"):
            stream.receive()
        with pytest.raises(LlmError, match="LLM_ENGINE_LOST"):
            stream.receive()


def test_without_the_driver_rows_go_to_the_own_engine(cluster: FakeCluster) -> None:
    first, second = pair(cluster)
    cluster.coordinator.close()
    wait_until(lambda: first.client.known_engines == 0)
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of(rows(5, 5)))
        assert len(answers(stream)) == 25
    assert len(first.engine.seen) == 25
    assert not second.engine.seen
    request = WindowRequest(query="q", node="n", limit=1)
    assert first.client.window(request) == 1


def test_an_engine_that_cannot_be_reached_from_here_is_left_out(cluster: FakeCluster) -> None:
    first, second = pair(cluster)
    second.server._member._membership._server.shutdown()  # type: ignore[union-attr]
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of(rows(8, 5)))
        assert {row: found["text"] for row, found in answers(stream).items()} == texts(rows(8, 5))
    assert len(first.engine.seen) == 40
    assert not second.engine.seen
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of(rows(8, 5, "more")))
        assert len(answers(stream)) == 40
    (router,) = cluster.coordinator._coordinator._routers.values()
    wait_until(lambda: not any(queued.rows for queued in router.queued().values()))


def test_a_limit_is_counted_over_all_executors_and_stops_all_streams(cluster: FakeCluster) -> None:
    first, second = pair(cluster)
    header = StreamOpen(query="q", node="n", limit=3)
    windows = [WindowRequest(query="q", node="n", limit=3, partition=k, attempt=k) for k in range(2)]
    with first.client.stream(header) as one, second.client.stream(header) as two, first.client.stream(HEADER) as other:
        assert first.client.window(windows[0]) == 1
        assert second.client.window(windows[1]) == 1
        one.send(batch_of({0: ["wait"]}))
        other.send(batch_of({0: ["x"]}))
        two.send(batch_of({0: ["now"], 1: ["wait"]}))
        assert two.receive().num_rows == 1
        done = WindowRequest(query="q", node="n", limit=3, partition=1, attempt=1, rows=3, hits=3)
        assert second.client.window(done) == 0
        wait_until(lambda: sum(len(executor.engine.cancelled) for executor in cluster.executors) == 2)
        for stream in (one, two):
            with pytest.raises(LimitReached):
                stream.receive()
            assert stream.stopped
            stream.send(batch_of({7: ["never asked"]}))
        assert len(answers(other)) == 1
        assert not other.stopped


def test_what_makes_an_engine_refuse_the_stream_ends_it(cluster: FakeCluster) -> None:
    first, _ = pair(cluster)
    with first.client.stream(HEADER) as stream:
        stream.send(batch_of({0: ["unreadable"]}))
        with pytest.raises(LlmError, match="LLM_CHAT_TEMPLATE_INVALID"):
            stream.receive()
    with pytest.raises(ValueError, match="closed"):
        stream.send(batch_of({1: ["late"]}))


def test_ids_are_unique_and_an_empty_stream_has_nothing_to_receive(cluster: FakeCluster) -> None:
    first, _ = pair(cluster)
    with first.client.stream(HEADER) as stream:
        assert stream.receive() is None
        stream.send(batch_of({0: ["wait"]}))
        with pytest.raises(ValueError, match="unique"):
            stream.send(batch_of({0: ["again"]}))
    with pytest.raises(LlmError, match="LLM_CANCELLED"):
        stream.receive()


def _own(executor: FakeExecutor) -> object:
    return executor.client._engines[executor.client._own_name]
