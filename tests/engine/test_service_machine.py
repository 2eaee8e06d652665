"""Whatever streams, limits, budgets, the cache and failures do: a row is answered once, or its stream has ended."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
from fake_service import FakeEngine, batch_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from spark_llm.engine.request import Completion, FinishReason, Request
from spark_llm.engine.service.folding import Answer, Folding, Stream
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.engine.service.protocol import Budget, ResultCache, StreamOpen, WindowRequest
from spark_llm.engine.service.requests import Requests
from spark_llm.engine.service.results import Results
from spark_llm.engine.service.server import _scope

BUDGETS = {"a": None, "b": Budget(calls=4), "c": Budget(length=30), "": None}  # by query
TEXTS = ["one", "two", "six", "flaky", "x" * 1001]
LIMIT = 5


class FlakyEngine(FakeEngine):
    """Two rows a step; each second row whose text is "flaky" fails by chance."""

    flaky = 0

    def _answer(self, request: Request) -> Completion:
        if bytes(request.prompt.astype(np.uint8)) == b"flaky":
            self.flaky += 1
            if self.flaky % 2:
                error = ("LLM_ENGINE_STEP_FAILED", {"attempts": "2", "reason": "by chance"})
                return Completion(request.id, [], FinishReason.ERROR, 5, 0, 5, error=error)
        return super()._answer(request)


@dataclass(eq=False)
class Client:
    """A stream as its client knows it: rows and their texts, and the answers so far."""

    stream: Stream
    requests: Requests
    rows: dict[int, tuple[str, bytes | None]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)


class ServiceMachine(RuleBasedStateMachine):
    """The loop and the streams' readers, one action after the other in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = FlakyEngine(batch=2)
        self.loop = EngineLoop(self.engine, lambda error: None)  # type: ignore[arg-type]
        self.loop.folding = Folding(most_bytes=2500)
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.hits: Counter[tuple[str, str]] = Counter()

    @rule(query=st.sampled_from(sorted(BUDGETS)), node=st.sampled_from(["", "n", "m"]), cached=st.booleans())
    def open(self, query: str, node: str, cached: bool) -> None:
        header = StreamOpen(
            query=query, node=node, limit=LIMIT if node else 0, budget=BUDGETS[query], cache=ResultCache()
        )
        cache = header.cache if query and cached else None
        stream = Stream(query, _scope(header), self.loop.next_id(), node, cache)
        requests = Requests(self.loop, cast(Any, self.engine.text), header, stream, cast(pa.RecordBatch, None))
        self.clients.append(Client(stream, requests))
        self.loop.open(stream)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 99), texts=st.lists(st.tuples(st.sampled_from(TEXTS), st.booleans()), max_size=6))
    def ask(self, which: int, texts: list[tuple[str, bool]]) -> None:
        client = self.clients[which % len(self.clients)]
        first = len(client.rows)
        rows = {first + i: (text, text.encode() if keyed else None) for i, (text, keyed) in enumerate(texts)}
        client.rows |= rows
        keys = [key for _, key in rows.values()]
        client.requests.pass_on(batch_of({row: [text] for row, (text, _) in rows.items()}, keys=keys))

    @rule()
    def messages(self) -> None:
        while not self.loop._inbox.empty():
            self.loop._inbox.get()()

    @rule()
    def step(self) -> None:
        self.messages()
        if self.engine.has_work():
            self.loop._dispatch(self.engine.step())

    @precondition(lambda self: self.clients)
    @rule(query=st.sampled_from(sorted(BUDGETS)), node=st.sampled_from(["n", "m"]), hits=st.integers(0, 3))
    def window(self, query: str, node: str, hits: int) -> None:
        self.hits[query, node] += hits
        total = self.hits[query, node]
        request = WindowRequest(query=query, node=node, limit=LIMIT, rows=total, hits=total)
        assert (self.loop.window(request) == 0) == (total >= LIMIT)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        client = self.clients.pop(which % len(self.clients))
        self.gone.append(client)
        self.loop.close(client.stream)

    @invariant()
    def no_row_is_answered_twice_or_wrongly(self) -> None:
        for client in self.clients:
            while not client.stream.outbox.empty():
                client.answers += client.stream.outbox.get()
            rows = [answer.row for answer in client.answers]
            assert len(set(rows)) == len(rows)
            for row, answer, folded, stored in client.answers:
                text, key = client.rows[row]
                assert not (folded and stored)
                if folded or stored:
                    assert key is not None
                    assert client.stream.query
                if stored:
                    assert client.stream.cache is not None
                    assert answer.prompt_tokens == answer.computed_tokens == 0
                if answer.error is None:
                    assert bytes(answer.output).decode() == text[::-1]
                elif answer.error[0] == "LLM_BUDGET_EXCEEDED":
                    assert BUDGETS[client.stream.query] is not None
                else:
                    assert text in ("flaky", "x" * 1001)

    @invariant()
    def budgets_hold(self) -> None:
        asked = Counter(request.hints.query for request in self.engine.seen if request.hints)
        repeats = self.engine.flaky  # a second try of what failed by chance is the same call
        assert asked["b"] <= 4 + repeats

    @invariant()
    def each_key_flies_once(self) -> None:
        keys = [flight.key for flight in self.loop._flights.values() if flight.key is not None]
        assert len(set(keys)) == len(keys)

    def teardown(self) -> None:
        self.messages()
        while self.engine.has_work():
            self.step()
        self.no_row_is_answered_twice_or_wrongly()
        for client in self.clients:
            assert client.stream.stopped or {a.row for a in client.answers} == set(client.rows), "a row is lost"
            assert not client.stream.flights
        assert not self.engine.rows
        assert not self.loop._flights
        assert not self.loop.folding._flights
        for client in list(self.clients):
            self.loop.close(client.stream)
        self.messages()
        assert not self.engine.streams
        assert not self.loop._limited


def test_service_machine() -> None:
    run_state_machine_as_test(
        ServiceMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


def test_results_hold_against_threads() -> None:
    """Lookups, new answers and clearing at a time: what is found is what was kept."""
    results, cache = Results(lambda: "m"), ResultCache(memory=100_000)
    wrong: list[object] = []

    def use(k: int) -> None:
        for n in range(2000):
            key = b"%d" % (n % 50)
            results.keep(cache, key, Completion(0, [n % 50], FinishReason.STOP, 1, 0, 1))
            wrong.extend(a for a in results.find(cache, [key]) if a is not None and a.output != [n % 50])
            if n % 500 == k:
                results.clear()

    threads = [threading.Thread(target=use, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert results.sizes().bytes <= 100_000
