"""What the service does so that the model is asked less: limits that stop streams, budgets, and the result cache."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow.flight as flight
import pytest
from fake_service import Service, answers, batch_of, wait_until

from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service import client as clients
from spark_llm.engine.service.client import LimitReached
from spark_llm.engine.service.protocol import Budget, ResultCache, StreamOpen, WindowRequest
from spark_llm.errors import LlmError


def limited(query: str = "q", node: str = "n") -> StreamOpen:
    return StreamOpen(query=query, node=node, limit=3)


def window(service: Service, hits: int, query: str = "q", node: str = "n") -> int:
    return service.client.window(WindowRequest(query=query, node=node, limit=3, rows=hits, hits=hits))


def test_when_the_limit_is_reached_the_nodes_streams_stop_and_their_rows_leave_the_engine(service: Service) -> None:
    headers = [limited(), limited(), limited(node="other"), limited(query="p"), StreamOpen(query="q", node="n")]
    streams = [service.client.stream(header) for header in headers]
    assert window(service, 0) == 1
    for stream in streams:
        stream.send(batch_of({1: ["wait"], 2: ["now"]}))
    wait_until(lambda: service.client.status().waiting == 5)
    assert window(service, 2) == 3
    assert window(service, 3) == 0
    for stream in streams[:2]:
        assert stream.receive()["id"].to_pylist() == [2]  # type: ignore[index]
        with pytest.raises(LimitReached):
            stream.receive()
        assert (stream.stopped, stream.unanswered) == (True, 1)
    wait_until(lambda: service.client.status().waiting == 3)
    service.engine.released.set()
    window(service, 3)  # wakes the loop
    for stream in streams[2:]:
        assert set(answers(stream)) == {1, 2}
        assert not stream.stopped
    for stream in streams:
        stream.close()
    wait_until(lambda: service.client.status().streams == 0)


def test_rows_that_others_wait_for_live_on(service: Service) -> None:
    with service.client.stream(limited()) as stopped, service.client.stream(StreamOpen(query="q")) as other:
        stopped.send(batch_of({1: ["wait"], 2: ["wait alone"]}, keys=[b"w", b"a"]))
        wait_until(lambda: len(service.engine.seen) == 2)
        other.send(batch_of({7: ["wait"]}, keys=[b"w"]))
        wait_until(lambda: service.client.status().queries["q"][0] == 3)
        assert window(service, 3) == 0
        with pytest.raises(LimitReached):
            stopped.receive()
        service.engine.released.set()
        window(service, 3)
        assert {row: answer["text"] for row, answer in answers(other).items()} == {7: "tiaw"}
    assert len(service.engine.cancelled) == 1


def test_rows_sent_after_the_stop_are_dropped_and_the_stream_can_be_closed_or_half_closed(service: Service) -> None:
    with service.client.stream(limited()) as stream:
        stream.send(batch_of({1: ["a"]}))
        assert set(answers(stream)) == {1}
        assert window(service, 3) == 0
        wait_until(lambda: stream.stopped)
        assert stream.receive() is None, "no row is open"
        stream.send(batch_of({2: ["b"]}))
        with pytest.raises(LimitReached):
            stream.receive()
    header = b'{"query": "p", "node": "n", "limit": 3}'
    writer, reader = service.client.channel().do_exchange(flight.FlightDescriptor.for_command(header))
    writer.begin(batch_of({}).schema)
    writer.write_batch(batch_of({1: ["wait"]}))
    wait_until(lambda: service.client.status().waiting == 1)
    assert window(service, 3, query="p") == 0
    chunk = reader.read_chunk()
    assert (chunk.data, chunk.app_metadata.to_pybytes()) == (None, b'{"stop":true}')
    writer.write_batch(batch_of({2: ["late"]}))
    writer.done_writing()
    with pytest.raises(StopIteration):
        reader.read_chunk()
    assert [bytes(r.prompt.tolist()) for r in service.engine.seen] == [b"a", b"wait"]


def test_a_window_request_that_makes_no_sense_is_refused(service: Service) -> None:
    with pytest.raises(flight.FlightError, match="malformed request for a window"):
        list(service.client.channel().do_action(flight.Action("window", b"{}")))


def test_beyond_the_budget_rows_are_answered_with_the_error(service: Service) -> None:
    header = StreamOpen(query="q", budget=Budget(calls=3))
    with service.client.stream(header) as first, service.client.stream(header) as second:
        first.send(batch_of({1: ["a"], 2: ["a"], 3: ["b"]}, keys=[b"a", b"a", b"b"]))
        assert {row: answer["text"] for row, answer in answers(first).items()} == {1: "a", 2: "a", 3: "b"}
        second.send(batch_of({i: [text] for i, text in enumerate("acdeab")}, keys=[b"%c" % c for c in b"acdeab"]))
        found = answers(second)
        assert {row: answer["text"] for row, answer in found.items()} == {
            0: "a", 1: "c", 2: None, 3: None, 4: "a", 5: "b",
        }  # fmt: skip
        assert str(found[2]["error"]).startswith(
            "[LLM_BUDGET_EXCEEDED] The query would go beyond spark.llm.budget.maxCalls = 3: the engine has made 3 calls"
        )
        assert found[3]["finish_reason"] == "error"
        assert found[3]["prompt_tokens"] == 0
        second.send(batch_of({10: ["d"], 11: ["a"]}, keys=[b"d", b"a"]))
        assert {row: answer["text"] for row, answer in answers(second).items()} == {10: None, 11: "a"}
    assert len(service.engine.seen) == 3
    with service.client.stream(StreamOpen(query="p", budget=Budget(calls=3))) as other:
        other.send(batch_of({1: ["d"]}, keys=[b"d"]))
        assert answers(other)[1]["text"] == "d"


def test_a_budget_of_tokens_counts_prompts_and_answers(service: Service) -> None:
    with service.client.stream(StreamOpen(query="q", budget=Budget(length=20))) as stream:
        stream.send(batch_of({1: ["abcd"]}))
        answers(stream)  # 8 tokens so far
        stream.send(batch_of({2: ["efghijkl"], 3: ["mnop"], 4: ["q"]}))  # 16, 20, and no more
        found = answers(stream)
    assert [found[row]["error"] is None for row in (2, 3, 4)] == [True, True, False]
    assert "maxLength = 20: the engine has taken 20 tokens" in str(found[4]["error"])


def test_another_query_gets_stored_answers(service: Service) -> None:
    params = SamplingParams(max_tokens=3)
    rows = {1: ["abc"], 2: ["def"], 3: ["x" * 2000], 4: ["no key"]}
    keys = [b"a", b"d", b"x", None]
    with service.client.stream(StreamOpen(query="1", cache=ResultCache(), params=params)) as stream:
        stream.send(batch_of(rows, keys=keys))
        assert not any(answer["stored"] for answer in answers(stream).values())
    header = StreamOpen(query="2", cache=ResultCache(), params=params, budget=Budget(calls=2))
    with service.client.stream(header) as stream:
        stream.send(batch_of(rows | {5: ["abc"]}, keys=[*keys, b"a"]))
        found = answers(stream)
        assert {row: (answer["stored"], answer["folded"]) for row, answer in found.items()} == {
            1: (True, False), 2: (True, False), 3: (False, False), 4: (False, False), 5: (False, True),
        }  # fmt: skip
        assert [found[row]["text"] for row in (1, 2, 3, 4, 5)] == ["cba", "fed", None, "yek on", "cba"]
        assert str(found[3]["error"]).startswith("[LLM_CONTEXT_LENGTH_EXCEEDED]"), "failed answers are not stored"
        assert {found[1][name] for name in found[1] if name.endswith("_tokens")} == {0}
        stream.send(batch_of({6: ["abc"], 7: ["new"]}, keys=[b"a", b"n"]))
        found = answers(stream)
        assert (found[6]["folded"], found[6]["text"]) == (True, "cba"), "stored answers cost no budget"
        assert str(found[7]["error"]).startswith("[LLM_BUDGET_EXCEEDED]")
    for header in (
        StreamOpen(query="3", params=params),
        StreamOpen(query="4", cache=ResultCache(), params=SamplingParams(max_tokens=4)),
        StreamOpen(query="5", cache=ResultCache(), params=params, system="Be kind."),
        StreamOpen(query="6", cache=ResultCache(cleared=2e9), params=params),
    ):
        with service.client.stream(header) as stream:
            stream.send(batch_of({1: ["abc"]}, keys=[b"a"]))
            assert not answers(stream)[1]["stored"], header
    status = service.client.status()
    assert (status.rows_stored, status.rows_folded) == (2, 2)
    assert status.cache_answers >= 2
    assert status.cache_bytes > 0


def test_rows_that_wait_while_the_cache_is_asked_get_its_answer(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = StreamOpen(query="1", cache=ResultCache())
    with service.client.stream(header) as stream:
        stream.send(batch_of({1: ["abc"]}, keys=[b"a"]))
        answers(stream)
    results, asked, go_on = service.results, threading.Event(), threading.Event()
    find = results.find

    def slow(*arguments: object) -> object:
        if not asked.is_set():
            asked.set()
            go_on.wait(5)
        return find(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(results, "find", slow)
    header = StreamOpen(query="2", cache=ResultCache())
    with service.client.stream(header) as first, service.client.stream(header) as second:
        first.send(batch_of({1: ["abc"]}, keys=[b"a"]))
        assert asked.wait(5)
        second.send(batch_of({2: ["abc"]}, keys=[b"a"]))
        wait_until(lambda: service.client.status().queries["2"][0] == 1)
        first.close()
        wait_until(lambda: service.client.status().streams == 1)
        go_on.set()
        found = answers(second)
    assert (found[2]["text"], found[2]["stored"], found[2]["folded"]) == ("cba", True, False)
    assert len(service.engine.seen) == 1


def test_closed_streams_leave_their_answers_in_the_folder(service: Service, tmp_path: Path) -> None:
    cache = ResultCache(path=str(tmp_path / "kept"))
    with service.client.stream(StreamOpen(query="1", cache=cache)) as stream:
        stream.send(batch_of({1: ["abc"]}, keys=[b"a"]))
        answers(stream)
    wait_until(lambda: bool(list((tmp_path / "kept").rglob("*.arrow"))))
    assert clients.clear_caches() >= 0
    list(service.client.channel().do_action(flight.Action("clear_cache", b"")))
    assert service.client.status().cache_answers == 0
    with service.client.stream(StreamOpen(query="2", cache=cache)) as stream:
        stream.send(batch_of({1: ["abc"]}, keys=[b"a"]))
        assert answers(stream)[1]["stored"]
    assert service.client.status().cache_segments == 1


def test_a_cache_that_cannot_be_used_fails_the_stream(service: Service, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with service.client.stream(StreamOpen(query="1", cache=ResultCache(path=f"{tmp_path}/file/x"))) as stream:
        stream.send(batch_of({1: ["abc"]}, keys=[b"a"]))
        with pytest.raises(LlmError, match=r"LLM_CACHE_UNAVAILABLE.*file/x"):
            answers(stream)
