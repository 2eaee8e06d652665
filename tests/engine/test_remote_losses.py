"""Whatever engines go, and whenever: every row of a stream is answered once, unless it was lost twice itself."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cluster import FakeCluster, fake_cluster
from fake_service import batch_of, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.service import coordinator, remote_member
from spark_llm.engine.service.dispatch import DispatchedStream
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.errors import LlmError

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(1, 12)),
        st.tuples(st.just("receive"), st.integers(1, 3)),
        st.tuples(st.just("lose"), st.integers(0, 2)),
    ),
    min_size=3,
    max_size=20,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    folder = tempfile.TemporaryDirectory()
    with pytest.MonkeyPatch.context() as monkeypatch, fake_cluster(Path(folder.name), monkeypatch, "d2lpm") as made:
        # an engine that was "lost" is soon believed to be there again
        monkeypatch.setattr(remote_member, "BEAT_SECONDS", 0.01)
        monkeypatch.setattr(coordinator, "_DISTRUST_SECONDS", 0.0)
        for _ in range(3):
            made.add(batch=2).engine.released.set()
        yield made
    folder.cleanup()


@settings(derandomize=True, max_examples=40, deadline=None)
@given(ACTIONS)
def test_every_row_is_answered_once(cluster: FakeCluster, actions: list[tuple[str, int]]) -> None:
    client = cluster.executors[0].client
    wait_until(lambda: client.known_engines == 3)
    sent: dict[int, str] = {}
    found: list[tuple[int, str]] = []
    with client.stream(StreamOpen(query="q")) as stream:
        try:
            for action, number in actions:
                if action == "send":
                    rows = {len(sent) + k: ["ask\n", f"{k // 3}\n", str(len(sent) + k)] for k in range(number)}
                    sent |= {row: "".join(segments)[::-1] for row, segments in rows.items()}
                    stream.send(batch_of(rows))
                elif action == "receive":
                    for _ in range(number):
                        found += receive(stream) if stream.unanswered else []
                elif stream._parts:
                    engines = sorted(stream._parts)
                    stream.abandon(engines[number % len(engines)], "lost by chance")
            while stream.unanswered:
                found += receive(stream)
            assert stream.receive() is None
            assert sorted(found) == sorted(sent.items())
        except LlmError as error:
            if error.condition != "LLM_ENGINE_LOST":
                raise
            assert max(stream._losses.values()) == 2, "no row was lost twice"
            assert len(found) == len(dict(found))
            assert set(found) <= set(sent.items())


def receive(stream: DispatchedStream) -> list[tuple[int, str]]:
    batch = stream.receive()
    assert batch is not None
    return list(zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True))


def test_one_thread_sends_while_another_receives_and_engines_go(cluster: FakeCluster) -> None:
    client = cluster.executors[1].client
    wait_until(lambda: client.known_engines == 3)
    found: list[tuple[int, str]] = []
    with client.stream(StreamOpen(query="q")) as stream:

        def send() -> None:
            for window in range(20):
                stream.send(batch_of({100 * window + k: ["ask\n", f"{k // 5}\n", str(k)] for k in range(20)}))

        sender = threading.Thread(target=send)
        sender.start()
        gone = False
        while len(found) < 400:
            if stream.unanswered:
                found += receive(stream)
            if len(found) > 100 and not gone:
                gone = True
                stream.abandon(next(iter(stream._parts)), "once")
        sender.join()
        assert stream.receive() is None
    assert dict(found) == {100 * w + k: f"ask\n{k // 5}\n{k}"[::-1] for w in range(20) for k in range(20)}
    assert len(found) == 400
