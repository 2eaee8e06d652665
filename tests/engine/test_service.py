"""The service: rows in, answers out, cancellation, folding, failures; over a fake engine, through real sockets."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow.flight as flight
import pytest
from fake_service import Service, answers, batch_of, wait_until

from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service import probe
from spark_llm.engine.service.process import ProcessId, owner
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, StreamOpen
from spark_llm.errors import LlmError


def test_rows_come_back_with_text_and_counts(service: Service) -> None:
    with service.client.stream(StreamOpen(params=SamplingParams(max_tokens=3), client="me")) as stream:
        stream.send(batch_of({7: ["Say: ", "abc"], 9: ["Say: ", "dé"]}, seeds=[None, 3]))
        found = answers(stream)
    assert {row: found[row]["text"] for row in found} == {7: "cba :yaS", 9: "éd :yaS"}
    assert found[9] == {
        "id": 9, "text": "éd :yaS", "finish_reason": "stop", "error": None, "prompt_tokens": 8,
        "instruction_tokens": 5, "cached_tokens": 5, "cached_instruction_tokens": 5, "computed_tokens": 3,
        "recomputed_tokens": 0, "output_tokens": 8, "folded": False, "stored": False,
        "confidence": None,
    }  # fmt: skip
    asked = [(r.seed, r.client.user, r.params.max_tokens) for r in service.engine.seen]
    assert asked == [(None, "me", 3), (3, "me", 3)]


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
    assert {name for name, _ in channel.list_actions()} == {"status", "window", "clear_cache", "join", "shutdown"}
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
