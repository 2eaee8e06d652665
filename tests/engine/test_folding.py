"""Equal rows of a query are computed once: every row of an open stream is answered once, whatever happens to others."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from spark_llm.engine.request import Completion, FinishReason, Request, SamplingParams
from spark_llm.engine.service.folding import Answer, Flight, Folding, Stream
from spark_llm.errors import LlmError


def completion(request_id: int, output: list[int], error: str | None = None) -> Completion:
    if error is not None:
        return Completion(request_id, [], FinishReason.ERROR, 5, 0, 5, error=(error, {}))
    return Completion(request_id, output, FinishReason.STOP, 5, 2, 3)


def fly(flight: Flight, request_id: int = 0) -> None:
    flight.request = Request(request_id, np.zeros(1, np.int32), SamplingParams())


def outbox(stream: Stream) -> list[Answer]:
    found: list[Answer] = []
    while not stream.outbox.empty():
        found += stream.outbox.get()
    return found


def test_an_equal_row_waits_for_the_one_in_flight_and_a_later_one_takes_the_answer() -> None:
    folding, first, second = Folding(), Stream("q"), Stream("q")
    positions, (flight,), answered = folding.claim(first, [1, 2], [b"k", b"k"])
    assert (positions, answered) == ([0], 0)
    assert folding.claim(second, [1], [b"k"]) == ([], [], 0)
    fly(flight)
    told, again = folding.settle(flight, completion(0, [7]))
    assert not again
    assert [(a.row, a.folded, a.completion.prompt_tokens) for a in told[first]] == [(1, False, 5), (2, True, 0)]
    assert [(a.row, a.folded, a.completion.output) for a in told[second]] == [(1, True, [7])]
    assert folding.claim(second, [2, 3], [b"k", b"other"])[::2] == ([1], 1)
    assert [(a.row, a.folded, a.completion.output) for a in outbox(second)] == [(2, True, [7])]


def test_what_never_folds() -> None:
    """Rows without a key or outside a query, and rows of another query or under other parameters."""
    folding = Folding()
    streams = [Stream("q"), Stream("q", b"other"), Stream("p"), Stream(""), Stream("")]
    claims = [folding.claim(stream, [0], [b"k"]) for stream in streams]
    claims += [folding.claim(streams[0], [1, 2], [None, None])]
    assert [len(claim.flights) for claim in claims] == [1, 1, 1, 1, 1, 2]
    for claim in claims:
        for flight in claim.flights:
            folding.settle(flight, completion(0, [7]))
    assert [len(folding.claim(stream, [9], [b"k"]).flights) for stream in streams] == [0, 0, 0, 1, 1]
    assert len(folding.claim(streams[0], [8], [None]).flights) == 1


def test_when_the_leading_stream_closes_the_next_row_leads() -> None:
    folding, first, second, third = Folding(), Stream("q"), Stream("q"), Stream("q")
    (flight,) = folding.claim(first, [1], [b"k"]).flights
    folding.claim(second, [2], [b"k"])
    folding.claim(third, [3], [b"k"])
    fly(flight, 40)
    for stream in (first, third):
        stream.closed = True
        assert folding.close(stream) == []
    told, _ = folding.settle(flight, completion(40, [7]))
    assert {s: [(a.row, a.folded) for a in answers] for s, answers in told.items()} == {second: [(2, False)]}


def test_a_request_that_nobody_waits_for_is_cancelled_and_its_key_begins_anew() -> None:
    folding, first, second = Folding(), Stream("q"), Stream("q")
    (flight,) = folding.claim(first, [1], [b"k"]).flights
    (early,) = folding.claim(first, [2], [b"early"]).flights
    fly(flight, 40)
    first.closed = True
    assert folding.close(first) == [40]
    assert not folding.wanted(early), "it was tokenised when its stream had gone"
    assert len(folding.claim(second, [1, 2], [b"k", b"early"]).flights) == 2


def test_a_row_of_a_closed_stream_does_not_keep_a_request() -> None:
    """A thread that still reads may claim for a stream that was closed meanwhile."""
    folding, late, first = Folding(), Stream("q", closed=True), Stream("q")
    (flight,) = folding.claim(first, [1], [b"k"]).flights
    folding.claim(late, [1], [b"k"])
    fly(flight, 3)
    first.closed = True
    assert folding.close(first) == [3]


def test_what_streams_share_that_close_at_once_is_cancelled_once() -> None:
    """Streams are closed by their own threads before the engine's thread hears of it, one after the other."""
    folding, first, second = Folding(), Stream("q"), Stream("q")
    (flight,) = folding.claim(first, [0], [b"a"]).flights
    fly(flight, 7)
    folding.claim(second, [0], [b"a"])
    first.closed = second.closed = True
    assert folding.close(first) == [7]
    assert folding.close(second) == []


def test_what_ends_before_the_engine_hears_that_its_leader_closed_is_not_cancelled() -> None:
    folding, first, second = Folding(), Stream("q"), Stream("q")
    (flight,) = folding.claim(first, [0], [b"a"]).flights
    fly(flight, 7)
    folding.claim(second, [0], [b"a"])
    first.closed = True
    told, _ = folding.settle(flight, completion(7, [1]))
    assert list(told) == [second]
    assert folding.close(first) == []


def test_a_refusal_is_the_answer_of_all_and_is_not_kept() -> None:
    folding, first, second = Folding(), Stream("q"), Stream("q")
    (flight,) = folding.claim(first, [1], [b"k"]).flights
    folding.claim(second, [2], [b"k"])
    fly(flight)
    told, again = folding.settle(flight, completion(0, [], "LLM_CONTEXT_LENGTH_EXCEEDED"))
    assert not again
    assert {s: [(a.row, a.completion.error, a.folded) for a in answers] for s, answers in told.items()} == {
        first: [(1, ("LLM_CONTEXT_LENGTH_EXCEEDED", {}), False)],
        second: [(2, ("LLM_CONTEXT_LENGTH_EXCEEDED", {}), True)],
    }
    assert folding.kept_bytes == 0
    assert len(folding.claim(second, [3], [b"k"]).flights) == 1


def test_what_failed_by_chance_is_tried_once_more_for_those_who_wait() -> None:
    folding, first, second = Folding(), Stream("q"), Stream("q")
    (flight,) = folding.claim(first, [1], [b"k"]).flights
    folding.claim(second, [2, 3], [b"k", b"k"])
    fly(flight)
    told, again = folding.settle(flight, completion(0, [], "LLM_ENGINE_STEP_FAILED"))
    assert again
    assert {s: [a.row for a in answers] for s, answers in told.items()} == {first: [1]}
    assert not first.flights
    told, again = folding.settle(flight, completion(1, [], "LLM_ENGINE_STEP_FAILED"))
    assert not again
    assert {s: [a.row for a in answers] for s, answers in told.items()} == {second: [2, 3]}


def test_streams_that_wait_for_a_batch_that_cannot_be_tokenised_fail_with_it() -> None:
    folding, first, second = Folding(), Stream("q"), Stream("q")
    flights = folding.claim(first, [1, 2], [b"k", None]).flights
    folding.claim(second, [2], [b"k"])
    error = LlmError("LLM_INVALID_REQUEST", reason="no")
    folding.give_up(flights, error)
    assert second.error is first.error is error
    assert not second.outbox.empty(), "the writer sleeps on"
    assert len(folding.claim(second, [3], [b"k"]).flights) == 1


def test_the_memory_of_answers_is_bounded_and_keeps_what_was_used_last() -> None:
    folding, stream = Folding(most_bytes=10_000), Stream("q")
    for row in range(100):
        claim = folding.claim(stream, [row, 1000 + row], [b"%d" % row, b"0"])
        for flight in claim.flights:
            folding.settle(flight, completion(0, [7] * 10))
        assert folding.kept_bytes <= 10_000
    assert folding.kept_bytes > 5_000
    claim = folding.claim(stream, list(range(2000, 2100)), [b"%d" % row for row in range(100)])
    assert 0 not in claim.positions
    assert 99 not in claim.positions
    assert claim.positions == list(range(1, 1 + len(claim.positions)))


class FoldingMachine(RuleBasedStateMachine):
    """Streams come, ask, close; requests are tokenised, done, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.folding = Folding(most_bytes=3000)
        self.streams: list[Stream] = []
        self.asked: dict[Stream, dict[int, bytes | None]] = {}
        self.answers: dict[Stream, list[Answer]] = {}
        self.claimed: list[Flight] = []
        self.flying: dict[int, Flight] = {}
        self.ids = itertools.count()
        self.computed: Counter[tuple[str, bytes]] = Counter()

    @rule(query=st.sampled_from(["", "a", "b"]))
    def open(self, query: str) -> None:
        stream = Stream(query)
        self.streams.append(stream)
        self.asked[stream], self.answers[stream] = {}, []

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 99), keys=st.lists(st.none() | st.sampled_from([b"1", b"2", b"3"]), max_size=5))
    def ask(self, which: int, keys: list[bytes | None]) -> None:
        stream = self.streams[which % len(self.streams)]
        rows = range(len(self.asked[stream]), len(self.asked[stream]) + len(keys))
        self.asked[stream] |= dict(zip(rows, keys, strict=True))
        claim = self.folding.claim(stream, rows, keys)
        assert len(claim.positions) == len(claim.flights)
        self.claimed += claim.flights

    @precondition(lambda self: self.claimed)
    @rule()
    def tokenise(self) -> None:
        flight = self.claimed.pop(0)
        if self.folding.wanted(flight):
            self.launch(flight)

    def launch(self, flight: Flight) -> None:
        request_id = next(self.ids)
        fly(flight, request_id)
        self.flying[request_id] = flight
        if flight.key is not None:
            self.computed[flight.key] += 1

    @precondition(lambda self: self.flying)
    @rule(
        which=st.integers(0, 99), fails=st.sampled_from([None, None, "LLM_INVALID_REQUEST", "LLM_ENGINE_STEP_FAILED"])
    )
    def done(self, which: int, fails: str | None) -> None:
        request_id = sorted(self.flying)[which % len(self.flying)]
        flight = self.flying.pop(request_id)
        told, again = self.folding.settle(
            flight, completion(request_id, [int(flight.key[1]) if flight.key else 0], fails)
        )
        for stream, answers in told.items():
            assert not stream.closed
            stream.outbox.put(answers)
        if again:
            self.launch(flight)

    @precondition(lambda self: self.streams)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        stream = self.streams.pop(which % len(self.streams))
        stream.closed = True
        for request_id in self.folding.close(stream):
            del self.flying[request_id]

    @invariant()
    def no_row_is_answered_twice_or_wrongly(self) -> None:
        for stream in self.streams:
            self.answers[stream] += outbox(stream)
            rows = [answer.row for answer in self.answers[stream]]
            assert len(set(rows)) == len(rows)
            for row, answer, folded, _ in self.answers[stream]:
                key = self.asked[stream][row]
                assert not (folded and (key is None or not stream.query))
                if answer.error is None and stream.query:
                    assert answer.output == [int(key) if key else 0]

    @invariant()
    def each_key_flies_once(self) -> None:
        keys = [flight.key for flight in self.flying.values() if flight.key is not None]
        assert len(set(keys)) == len(keys)

    def teardown(self) -> None:
        while self.claimed:
            self.tokenise()
        while self.flying:
            self.done(0, None)
        self.no_row_is_answered_twice_or_wrongly()
        for stream in self.streams:
            assert {answer.row for answer in self.answers[stream]} == set(self.asked[stream]), "a row is lost"
            assert not stream.flights
        assert not self.folding._flights


def test_folding_machine() -> None:
    run_state_machine_as_test(
        FoldingMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
