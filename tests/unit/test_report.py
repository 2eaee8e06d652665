"""Counters on their way to a report: merged by query and call, over the back-channel, and as text."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from spark_llm import tally as tallies
from spark_llm.backchannel import Address, Listener, Sender
from spark_llm.report import Report
from spark_llm.tally import OTHER_PROMPTS, Counts, Tally, TaskUpdate


def update(task: str, query: str = "1", number: int = 1, prompt: str = "p", **counts: object) -> TaskUpdate:
    return TaskUpdate(query=query, task=task, number=number, prompt=prompt, counts=Counts(**counts))  # type: ignore[arg-type]


def test_counts_add_up_and_times_span() -> None:
    total = Counts()
    total.add(Counts(rows=2, calls=1, first_sent=5.0, last_answer=6.0, errors=["a"]))
    total.add(Counts(rows=3, calls=3, first_sent=0.0, last_answer=0.0))
    total.add(Counts(rows=1, calls=1, first_sent=4.0, last_answer=5.5, errors=["a", "b"]))
    assert total == Counts(rows=6, calls=5, first_sent=4.0, last_answer=6.0, errors=["a", "b"])


def test_the_newest_update_of_a_task_counts_once() -> None:
    tally = Tally()
    tally.merge(update("t", number=1, rows=1))
    tally.merge(update("t", number=3, rows=5))
    tally.merge(update("t", number=2, rows=3))
    tally.merge(update("u", number=1, rows=10))
    assert tally.counts("1")["p"].rows == 15


def test_queries_stay_in_order_and_apart() -> None:
    tally = Tally()
    for query in ("7", "10", "7"):
        tally.merge(update(f"t{query}", query=query, rows=1))
    assert tally.queries() == ["7", "10"]
    assert tally.counts("8") == {}


def test_calls_are_kept_apart_by_prompt_up_to_a_limit() -> None:
    tally = Tally()
    for number in range(tallies.MAX_CALLS + 5):
        tally.merge(update(f"t{number}", prompt=f"p{number}", rows=1))
    counts = tally.counts("1")
    assert len(counts) == tallies.MAX_CALLS + 1
    assert counts["p0"].rows == 1
    assert counts[OTHER_PROMPTS].rows == 5


def test_old_queries_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "MAX_QUERIES", 3)
    tally = Tally()
    for number in range(5):
        tally.merge(update("t", query=str(number)))
    assert tally.queries() == ["2", "3", "4"]


def test_a_querys_first_failure_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    with caplog.at_level(logging.WARNING, "spark_llm"):
        tally.merge(update("t", rows=1))
        assert not caplog.records
        tally.merge(update("t", number=2, failed=1, errors=["[LLM_X] too long"]))
        tally.merge(update("u", failed=4, errors=["[LLM_Y] other"]))
    assert [("too long" in record.message, "query 1" in record.message) for record in caplog.records] == [(True, True)]


@pytest.fixture
def listener() -> Iterator[tuple[Tally, Listener]]:
    tally = Tally()
    listener = Listener(tally)
    yield tally, listener
    listener.close()


def test_what_was_sent_is_there_when_send_returns(listener: tuple[Tally, Listener]) -> None:
    tally, channel = listener
    sender = Sender(channel.address)
    for number in range(1, 50):
        sender.send(update("t", number=number, rows=number))
        assert tally.counts("1")["p"].rows == number
    assert set(tally.active()) == {"1"}
    sender.close()
    with tally.changed:
        assert tally.changed.wait_for(lambda: not tally.working(), 10)


def test_a_task_that_breaks_off_is_gone_but_counted(listener: tuple[Tally, Listener]) -> None:
    tally, channel = listener
    sender = Sender(channel.address)
    sender.send(update("t", rows=3))
    assert sender._socket is not None
    sender._socket.shutdown(socket.SHUT_RDWR)
    with tally.changed:
        assert tally.changed.wait_for(lambda: not tally.working(), 10)
    assert tally.counts("1")["p"].rows == 3


def test_without_the_key_nothing_is_taken(listener: tuple[Tally, Listener]) -> None:
    tally, channel = listener
    Sender(channel.address._replace(key="wrong")).send(update("t", rows=3))
    assert tally.queries() == []


def test_rubbish_ends_only_its_own_connection(listener: tuple[Tally, Listener]) -> None:
    tally, channel = listener
    with socket.create_connection(channel.address[:2], 5) as rubbish:
        rubbish.sendall(channel.address.key.encode() + b"\n{]\n")
        assert rubbish.recv(1) == b""
    Sender(channel.address).send(update("t", rows=3))
    assert tally.counts("1")["p"].rows == 3


def test_many_tasks_at_a_time(listener: tuple[Tally, Listener]) -> None:
    tally, channel = listener

    def work(task: int) -> None:
        sender = Sender(channel.address)
        for number in range(1, 21):
            sender.send(update(f"t{task}", number=number, rows=number))
        sender.close()

    threads = [threading.Thread(target=work, args=(task,)) for task in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.counts("1")["p"].rows == 400


def test_an_unreachable_driver_costs_a_task_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1], "key")
    sender = Sender(address)
    sender.send(update("t"))
    sender.send(update("t"))
    Sender(None).send(update("t"))
    sender.close()


def test_a_closed_listener_is_gone() -> None:
    channel = Listener(Tally())
    channel.close()
    channel.thread.join(10)
    channel.close()
    with pytest.raises(OSError):  # noqa: PT011 - refused, or reset, as the system likes
        socket.create_connection(channel.address[:2], 1)


def test_rates_of_a_report() -> None:
    report = Report(
        query="1",
        prompt_tokens=100,
        cached_tokens=60,
        instruction_tokens=50,
        cached_instruction_tokens=45,
    )
    assert report.prefix_hit_rate == 0.6
    assert report.instruction_hit_rate == 0.9
    assert report.data_hit_rate == 0.3
    assert Report(query="2").prefix_hit_rate == 0.0


def test_a_report_prints_its_numbers() -> None:
    report = Report(
        query="3",
        rows=1234,
        calls=200,
        duplicates=1000,
        nulls=30,
        failed=4,
        prompt_tokens=5000,
        cached_tokens=4000,
        computed_tokens=1000,
        output_tokens=321,
        seconds=2.5,
        errors=("[LLM_X] y",),
    )
    for part in ("query 3", "1,234 rows", "2.5 s", "1,000 duplicates", "80.0%", "321", "[LLM_X] y", "4 failed"):
        assert part in str(report)


def test_updates_are_small_and_survive_json() -> None:
    sent = update("t" * 16, rows=1)
    assert msgspec.json.decode(msgspec.json.encode(sent), type=TaskUpdate) == sent
