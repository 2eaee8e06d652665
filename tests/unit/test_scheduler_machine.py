"""A state machine drives the engine over a fake model: rows come, are cancelled, fail, are preempted, and finish.

The fake keeps in every K/V slot the hash of the tokens up to it, so that a row that reads a page which is not
its own, was never filled, or was overwritten is found at once. Its next token is a function of the context.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Completion, FinishReason, Hints, Request, SamplingParams
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.scheduler import StepPlan
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

_EMPTY = -1


def context_hash(tokens: list[int]) -> int:
    """A number below 2**60 that says which tokens these are."""
    return int(hashlib.sha1(np.array(tokens, np.int32).tobytes()).hexdigest()[:15], 16)


class FakeRunner:
    """Fills and reads slots as the decoder does; ``first_token`` is where the alphabet of answers begins.

    Steps with a row of ``bad`` in them fail, as does one step when ``fails_next`` is set, half-way through.
    """

    def __init__(self, cache: CacheManager, page_size: int, first_token: int, eos_id: int) -> None:
        self.decoder = SimpleNamespace(
            config=SimpleNamespace(context_length=10_000, sliding_window=None, eos_ids=(eos_id,))
        )
        self.cache = cache
        self.page_size = page_size
        self.first_token = first_token
        self.content = np.full(cache.pool.total * page_size, _EMPTY, dtype=np.int64)
        self.bad: set[int] = set()
        self.fails_next = False
        self.run_tokens: Counter[int] = Counter()  # request id -> tokens run, failed steps included
        self.failures: Counter[int] = Counter()  # request id -> failed steps in a row
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> dict[int, int]:
        self.plans.append(plan)
        written: set[int] = set()
        for scheduled in plan.rows:
            row, start, stop = scheduled.row, scheduled.start, scheduled.start + scheduled.count
            assert scheduled.count > 0
            self.run_tokens[row.request.id] += scheduled.count
            slots = self.slots(row, start, stop)
            assert not written & set(slots), "two rows fill one slot"
            assert not self.cache.pool.is_free(row.pages[: row.num_pages]).any(), "a row stands on a free page"
            written.update(slots)
            self.content[slots] = self.hashes(row, start, stop)
        if self.fails_next or any(s.row.request.id in self.bad for s in plan.rows):
            self.fails_next = False
            for slot in written:  # what a failed step leaves behind is worth nothing
                self.content[slot] = _EMPTY
            self.failures.update(s.row.request.id for s in plan.rows)
            raise RuntimeError("the fake step failed")
        for scheduled in plan.rows:
            row, stop = scheduled.row, scheduled.start + scheduled.count
            assert self.content[self.slots(row, 0, stop)].tolist() == self.hashes(row, 0, stop), "wrong K/V is read"
        for scheduled in plan.rows:
            del self.failures[scheduled.row.request.id]
        return {s.row.request.id: self.next_token(s.row.tokens[: s.row.num_tokens]) for s in plan.rows if s.samples}

    def poison(self) -> None:
        """Free pages hold nothing from now on."""
        free = self.cache.pool.is_free(np.arange(self.cache.pool.total, dtype=np.int32))
        self.content.reshape(-1, self.page_size)[free] = _EMPTY

    def slots(self, row: Row, start: int, stop: int) -> list[int]:
        return [
            int(row.pages[at // self.page_size]) * self.page_size + at % self.page_size for at in range(start, stop)
        ]

    def hashes(self, row: Row, start: int, stop: int) -> list[int]:
        return [context_hash(row.tokens[: at + 1].tolist()) for at in range(start, stop)]

    def next_token(self, tokens: Any) -> int:
        return self.first_token + context_hash(list(tokens)) % 4

    def answer(self, request: Request) -> list[int]:
        """What the engine must answer."""
        context, output = request.prompt.tolist(), []
        while len(output) < request.params.max_tokens:
            output.append(self.next_token(context + output))
            if output[-1] in self.decoder.config.eos_ids and not request.params.ignore_eos:
                break
        return output


def build(
    *, page_size: int, pages: int, batch: int, running: int, patience: int = 2, first_token: int = 100
) -> tuple[Engine, FakeRunner]:
    cache = CacheManager(pages, page_size)
    runner = FakeRunner(cache, page_size, first_token, eos_id=first_token)
    spec = EngineSpec(page_size=page_size, max_batch_tokens=batch, max_running_rows=running, check_invariants=True)
    engine = Engine(spec, cast(Any, runner), cache, cast(Any, None), "float32")
    engine.scheduler.waiting = LongestPrefixFirst(patience)
    cache.eviction.follow(engine.scheduler.waiting)
    return engine, runner


class EngineMachine(RuleBasedStateMachine):
    """Everything that may happen to an engine between two steps, and steps that fail."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[int, Request] = {}
        self.cancelled: set[int] = set()
        self.answers: dict[int, Completion] = {}
        self.streams: set[int] = set()

    @initialize(
        page_size=st.sampled_from([1, 1, 2, 4, 16]),
        pages=st.integers(1, 40),
        batch=st.integers(1, 9) | st.just(64),
        running=st.integers(1, 6),
        first_token=st.sampled_from([0, 100]),
    )
    def start(self, page_size: int, pages: int, batch: int, running: int, first_token: int) -> None:
        pages = max(2, -(-pages // page_size) + 1)
        self.engine, self.runner = build(
            page_size=page_size, pages=pages, batch=batch, running=running, first_token=first_token
        )
        self.batch, self.most_running = batch, running
        self.room = pages * page_size

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=30),
        like=st.none() | st.tuples(st.integers(0, 99), st.integers(1, 30)),
        max_tokens=st.integers(1, 6),
        reuse=st.integers(0, 9),
        bad=st.integers(0, 9),
        ignore_eos=st.booleans(),
        hints=st.none()
        | st.builds(
            Hints,
            st.integers(0, 2),
            st.sampled_from(["", "a", "b"]),
            st.integers(0, 20),
            st.integers(0, 2),
            st.integers(0, 20),
        ),
    )
    def add(
        self,
        prompt: list[int],
        like: tuple[int, int] | None,
        max_tokens: int,
        reuse: int,
        bad: int,
        ignore_eos: bool,
        hints: Hints | None,
    ) -> None:
        if like is not None and self.requests:
            other = self.requests[like[0] % len(self.requests)].prompt.tolist()
            prompt = other[: like[1]] + prompt
        prompt = prompt[-max(1, self.room - max_tokens) :]
        request = Request(
            id=len(self.requests),
            prompt=np.array(prompt, np.int32),
            params=SamplingParams(max_tokens=min(max_tokens, self.room - len(prompt)), ignore_eos=ignore_eos),
            reuse=reuse > 0,
            hints=hints,
        )
        if request.params.max_tokens < 1:
            return
        self.requests[request.id] = request
        if bad == 0:
            self.runner.bad.add(request.id)
        self.engine.add(request)

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        if which in self.requests:
            self.engine.cancel([which])
            if which not in self.answers:
                self.cancelled.add(which)

    @rule(stream=st.integers(0, 2), query=st.sampled_from(["", "a", "b"]))
    def open_or_close(self, stream: int, query: str) -> None:
        """Streams, whose hints may be wrong in every way."""
        if stream in self.streams:
            self.streams.remove(stream)
            self.engine.close(stream)
        else:
            self.streams.add(stream)
            self.engine.open(stream, query)

    @rule(which=st.integers(0, 9))
    def preempt(self, which: int) -> None:
        running = self.engine.scheduler.running
        if running:
            self.engine.scheduler.preempt(running[which % len(running)])

    @rule()
    def evict_all(self) -> None:
        self.engine.scheduler.cache.clear()

    @rule()
    def step(self) -> None:
        self.runner.poison()
        work = self.engine.has_work()
        steps = len(self.runner.plans)
        for completion in self.engine.step():
            assert completion.id not in self.answers, "a row is answered twice"
            assert completion.id not in self.cancelled, "a cancelled row is answered"
            self.answers[completion.id] = completion
        assert (len(self.runner.plans) > steps) == work, "an engine with work idles"
        if work:
            plan = self.runner.plans[-1]
            assert 0 < plan.num_tokens <= self.batch
            ids = [s.row.request.id for s in plan.rows]
            assert len(set(ids)) == len(ids), "a row is planned twice"
            assert len(self.engine.scheduler.running) <= self.most_running

    @rule()
    def failing_step(self) -> None:
        self.runner.fails_next = True
        self.step()
        self.runner.fails_next = False

    @rule(count=st.integers(2, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: hasattr(self, "engine"))
    @invariant()
    def sound(self) -> None:
        validate_invariants(self.engine.scheduler)

    def teardown(self) -> None:
        """Every row that is left gets its answer; then nothing is held."""
        if not hasattr(self, "engine"):
            return
        limit = 4 * sum(len(r.prompt) + r.params.max_tokens for r in self.requests.values()) + 10
        while self.engine.has_work():
            self.step()
            limit -= 1
            assert limit > 0, "the engine makes no progress"
        assert set(self.answers) == set(self.requests) - self.cancelled
        for id_, completion in self.answers.items():
            request = self.requests[id_]
            run = self.runner.run_tokens[id_] - completion.computed_tokens - completion.recomputed_tokens
            if completion.finish_reason is FinishReason.ERROR:
                assert completion.error is not None
                assert completion.error[0] == "LLM_ENGINE_STEP_FAILED"
                assert self.runner.failures[id_] == 2, "a row is given up that has not failed alone"
                continue
            assert id_ not in self.runner.bad
            assert completion.output == self.runner.answer(request)
            assert completion.prompt_tokens == completion.cached_tokens + completion.computed_tokens
            assert completion.prompt_tokens == len(request.prompt)
            assert 0 <= run <= len(completion.output) - 1, "tokens were run that no counter shows"
            if self.runner.first_token:  # no answer is found in a prompt's pages
                assert run == len(completion.output) - 1
        scheduler = self.engine.scheduler
        assert not scheduler.running
        assert not len(scheduler.waiting)
        assert not scheduler._suspects
        assert scheduler.cache.tree.protected == 0
        scheduler.cache.clear()
        assert scheduler.cache.pool.free == scheduler.cache.pool.total


def test_engine_machine(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "spark_llm")
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))
