"""A state machine drives the engine over a fake model: rows come, are cancelled, fail, are preempted, and finish.

The fake keeps in every K/V slot the hash of the tokens up to it, so that a row that reads a page which is not
its own, was never filled, or was overwritten is found at once. Its next token is a function of the context.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast
from unittest.mock import patch

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
from spark_llm.engine.constraints import trust as trust_module
from spark_llm.engine.core import Engine
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Client, Completion, FinishReason, Hints, Request, SamplingParams
from spark_llm.engine.scheduling import admission as admission_module
from spark_llm.engine.scheduling import decoding as decoding_module
from spark_llm.engine.scheduling.accounts import Account, QueryAccount, UserAccount
from spark_llm.engine.scheduling.fair import FairQueue
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Scheduled
from spark_llm.engine.scheduling.sharing import Counters, Deficits
from spark_llm.engine.scheduling.waiting import DepthFirst, FirstComeFirstServed, LongestPrefixFirst, WaitingQueue

sys.path.append(str(Path(__file__).parent))

from fake_grammar import FakeGrammar

_EMPTY = -1
QUEUES: dict[str, Callable[[int], WaitingQueue]] = {
    "dlpm": lambda patience: FairQueue(lambda: Deficits(7), lambda: LongestPrefixFirst(patience)),
    "vtc": lambda patience: FairQueue(Counters, FirstComeFirstServed),
    "lpm": LongestPrefixFirst,
    "fcfs": lambda patience: FirstComeFirstServed(),
    "depth first": lambda patience: DepthFirst(),
    "dlpm, depth first": lambda patience: FairQueue(lambda: Deficits(40), DepthFirst),
}


def context_hash(tokens: list[int]) -> int:
    """A number below 2**60 that says which tokens these are."""
    return int(hashlib.sha1(np.array(tokens, np.int32).tobytes()).hexdigest()[:15], 16)


class FakeStep:
    """A step that the fake has run, or, where ``error`` is set, one that fails when it is waited for."""

    def __init__(self, runner: FakeRunner, plan: StepPlan, tokens: list[int], ids: list[int], error: bool) -> None:
        self.runner, self.plan, self.ids, self.error = runner, plan, ids, error
        self.sampled = np.array(tokens, np.int32)

    def tokens(self) -> np.ndarray:
        assert self.runner.stream.pop(0) is self, "steps are waited for in the order of their launch"
        self.runner.landed += 1
        if self.error:
            self.runner.stream.clear()  # what was launched upon it goes, too
            self.runner.fail(self.plan, self.ids)
        for id_ in self.ids:
            if self.runner.failed_at.get(id_, 0) < self.plan.step:
                self.runner.failures.pop(id_, None)
        return self.sampled

    def log_probs(self) -> np.ndarray:
        return np.full(len(self.sampled), np.nan, np.float32)


class FakeRunner:
    """Fills and reads slots as a GPU does; ``first_token`` is where the alphabet of answers begins.

    A step runs when it is launched. Page tables and the tokens sampled last are the device's: it knows what plans told.
    Steps with a row of ``bad`` in them fail, as does one step when ``fails_next`` is set: half-way through the launch,
    or, with ``fails_late``, when they are waited for. What a failed step wrote, and what was computed upon it, is gone.
    """

    def __init__(self, cache: CacheManager, page_size: int, first_token: int, eos_id: int, depth: int) -> None:
        self.config = SimpleNamespace(context_length=10_000, sliding_window=None, eos_ids=(eos_id,))
        self.depth = depth
        self.cache = cache
        self.page_size = page_size
        self.first_token = first_token
        self.content = np.full(cache.pool.total * page_size, _EMPTY, dtype=np.int64)
        self.table: dict[int, dict[int, int]] = {}  # lane -> column -> page
        self.context: dict[int, list[int]] = {}  # lane -> the tokens that the device has, the last one sampled
        self.bad: set[int] = set()
        self.fails_next = self.fails_late = False
        self.run_tokens: Counter[int] = Counter()  # request id -> tokens run, failed steps included
        self.failures: Counter[int] = Counter()  # request id -> failed steps in a row
        self.failed_at: dict[int, int] = {}  # request id -> step that failed last
        self.plans: list[StepPlan] = []
        self.stream: list[FakeStep] = []  # launched and not waited for
        self.landed = 0

    def launch(self, plan: StepPlan) -> FakeStep:
        self.plans.append(plan)
        shares = plan.shares()
        ids = [s.row.request.id for s in shares]
        self.run_tokens.update({s.row.request.id: s.count for s in shares})
        assert len(self.stream) < self.depth, "too many steps in flight"
        self.update_tables(plan)
        written = self.write(plan, shares)
        fails = self.fails_next or any(id_ in self.bad for id_ in ids)
        lost = any(step.error for step in self.stream)
        self.fails_next = False
        if fails or lost:
            self.content[written] = _EMPTY
            for s in shares:
                self.context.pop(s.lane, None)
            if fails and not self.fails_late:
                self.fail(plan, ids)
            step = FakeStep(self, plan, [-1] * plan.num_sampled, ids, error=fails)
        else:
            step = FakeStep(self, plan, self.sample(plan, shares), ids, error=False)
        self.stream.append(step)
        return step

    def update_tables(self, plan: StepPlan) -> None:
        updates, at = plan.page_updates, 0
        for lane, first, count in zip(updates.lanes, updates.firsts, updates.counts, strict=True):
            row = self.table.setdefault(int(lane), {})
            for column in range(first, first + count):
                row[column] = int(updates.pages[at])
                at += 1
        assert at == len(updates.pages)
        for s in plan.shares():
            count = -(-(s.start + s.count) // self.page_size)
            ours, theirs = self.table[s.lane], plan.lanes.table[s.lane, :count].tolist()
            assert [ours[column] for column in range(count)] == theirs, "the device's page table is another"

    def write(self, plan: StepPlan, shares: list[Scheduled]) -> list[int]:
        """Tokens and K/V of all rows; the slots that were written."""
        written: set[int] = set()
        lost = any(step.error for step in self.stream)
        for at, s in enumerate(shares):
            stop = s.start + s.count
            assert s.count > 0
            if at < len(plan.rows):
                assert stop <= s.row.num_tokens, "a token is planned that nobody knows"
                self.context[s.lane] = s.row.tokens[:stop].tolist()
            elif lost:
                self.context[s.lane] = [-1] * stop
            assert len(self.context[s.lane]) == stop, "the device has other tokens than are planned"
            slots = self.slots(s.lane, s.start, stop)
            assert not written & set(slots), "two rows fill one slot"
            pages = np.array([self.table[s.lane][column] for column in range(-(-stop // self.page_size))])
            assert not self.cache.pool.is_free(pages).any(), "a row stands on a free page"
            written.update(slots)
            self.content[slots] = self.hashes(s.lane, s.start, stop)
        return list(written)

    def sample(self, plan: StepPlan, shares: list[Scheduled]) -> list[int]:
        masked = {}
        if plan.choices is not None:
            masked = dict(zip(plan.choices.masked.tolist(), cast(Any, plan.choices.maskers), strict=True))
        for s in shares:
            stop = s.start + s.count
            found, expected = self.content[self.slots(s.lane, 0, stop)].tolist(), self.hashes(s.lane, 0, stop)
            assert found == expected, "wrong K/V is read"
        tokens = []
        for s in shares:
            if s.samples:
                masker = masked.get(len(tokens))
                assert masker is None or masker.output == self.context[s.lane][s.row.num_prompt :], "a mask of the past"
                tokens.append(self.next_token(self.context[s.lane], None if masker is None else masker.allowed()))
                self.context[s.lane].append(tokens[-1])
        return tokens

    def fail(self, plan: StepPlan, ids: list[int]) -> NoReturn:
        self.failures.update(ids)
        self.failed_at.update(dict.fromkeys(ids, plan.step))
        raise RuntimeError("the fake step failed")

    def poison(self) -> None:
        """Free pages hold nothing from now on."""
        free = self.cache.pool.is_free(np.arange(self.cache.pool.total, dtype=np.int32))
        self.content.reshape(-1, self.page_size)[free] = _EMPTY

    def slots(self, lane: int, start: int, stop: int) -> list[int]:
        size, row = self.page_size, self.table[lane]
        return [row[at // size] * size + at % size for at in range(start, stop)]

    def hashes(self, lane: int, start: int, stop: int) -> list[int]:
        return [context_hash(self.context[lane][: at + 1]) for at in range(start, stop)]

    def next_token(self, tokens: Any, allowed: list[int] | None = None) -> int:
        """The best token, of those that are ``allowed``."""
        best = context_hash(list(tokens))
        ranked = [self.first_token + (best + place) % 4 for place in range(4)]
        return next(token for token in ranked if allowed is None or token in allowed)

    def answer(self, request: Request) -> list[int]:
        """What the engine must answer."""
        context, output = request.prompt.tolist(), []
        grammar: Any = request.constraint
        if grammar is not None:
            most = request.params.max_tokens
            output += grammar.forced
            while len(output) < most and not grammar.is_done(output):
                output.append(self.next_token(context + output, grammar.allowed(output)))
                output += grammar.following(output)
            return output[:most]
        while len(output) < request.params.max_tokens:
            output.append(self.next_token(context + output))
            if output[-1] in self.config.eos_ids and not request.params.ignore_eos:
                break
            if request.is_stopped is not None and request.is_stopped(output):
                break
        return output


def build(
    *,
    page_size: int,
    pages: int,
    batch: int,
    running: int,
    scheduler: str = "lpm",
    patience: int = 2,
    first_token: int = 100,
    depth: int = 1,
) -> tuple[Engine, FakeRunner]:
    cache = CacheManager(pages, page_size)
    runner = FakeRunner(cache, page_size, first_token, eos_id=first_token, depth=depth)
    spec = EngineSpec(page_size=page_size, max_batch_tokens=batch, max_running_rows=running, check_invariants=True)
    with patch("spark_llm.engine.core.waiting_queue", lambda *_: QUEUES[scheduler](patience)):
        engine = Engine(spec, cast(Any, runner), cache, cast(Any, None), "float32")
    return engine, runner


def test_a_weight_that_is_none_is_refused() -> None:
    """It would be the end of the engine, and of all others' rows."""
    engine, _ = build(page_size=1, pages=64, batch=8, running=2, scheduler="dlpm")
    weights = [1e-310, float("nan"), float("inf"), 0.0, 1e-6, 1e6]
    for row, weight in enumerate(weights):
        params = SamplingParams(max_tokens=1)
        engine.add(Request(row, np.array([3, 4], np.int32), params, client=Client(f"c{row}", "", weight)))
    done = {}
    while engine.has_work():
        done.update((answer.id, answer.error) for answer in engine.step())
    assert [done[row] is None for row in range(len(weights))] == [False, False, False, False, True, True]
    assert (done[0] or ("", {}))[0] == "LLM_INVALID_REQUEST"


class EngineMachine(RuleBasedStateMachine):
    """Everything that may happen to an engine between two steps, and steps that fail."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[int, Request] = {}
        self.cancelled: set[int] = set()
        self.answers: dict[int, Completion] = {}
        self.streams: set[int] = set()
        self.accounts: dict[Account, None] = {}

    @initialize(
        page_size=st.sampled_from([1, 1, 2, 4, 16]),
        pages=st.integers(1, 40),
        batch=st.integers(1, 9) | st.just(64),
        running=st.integers(1, 6),
        first_token=st.sampled_from([0, 100]),
        depth=st.sampled_from([1, 2, 2]),
        scheduler=st.sampled_from(sorted(QUEUES)),
    )
    def start(
        self, page_size: int, pages: int, batch: int, running: int, first_token: int, depth: int, scheduler: str
    ) -> None:
        pages = max(2, -(-pages // page_size) + 1)
        self.scheduler = scheduler
        self.engine, self.runner = build(
            page_size=page_size,
            pages=pages,
            batch=batch,
            running=running,
            scheduler=scheduler,
            first_token=first_token,
            depth=depth,
        )
        self.batch, self.most_running = batch, running
        self.grammars = [
            FakeGrammar(first_token, 0, 15), FakeGrammar(first_token, 1, 4, (first_token + 2,)), None, None,
        ]  # fmt: skip
        self.room = pages * page_size

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=30),
        like=st.none() | st.tuples(st.integers(0, 99), st.integers(1, 30)),
        max_tokens=st.integers(1, 6),
        reuse=st.integers(0, 9),
        bad=st.integers(0, 9),
        ignore_eos=st.booleans(),
        stops=st.integers(0, 3),
        grammar=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
        hints=st.none()
        | st.builds(
            Hints,
            st.integers(0, 2),
            st.sampled_from(["", "a", "b"]),
            st.integers(0, 20),
            st.integers(0, 2),
            st.integers(0, 20),
        ),
        client=st.builds(Client, st.sampled_from("xxyz"), st.sampled_from("ppq"), st.sampled_from([1.0, 1.0, 2.5])),
    )
    def add(
        self,
        prompt: list[int],
        like: tuple[int, int] | None,
        max_tokens: int,
        reuse: int,
        bad: int,
        ignore_eos: bool,
        stops: int,
        grammar: int,
        temperature: float,
        hints: Hints | None,
        client: Client,
    ) -> None:
        if like is not None and self.requests:
            other = self.requests[like[0] % len(self.requests)].prompt.tolist()
            prompt = other[: like[1]] + prompt
        prompt = prompt[-max(1, self.room - max_tokens) :]
        request = Request(
            id=len(self.requests),
            prompt=np.array(prompt, np.int32),
            params=SamplingParams(
                max_tokens=min(max_tokens, self.room - len(prompt)), ignore_eos=ignore_eos, temperature=temperature
            ),
            reuse=reuse > 0,
            hints=hints,
            client=client,
            constraint=cast(Any, self.grammars[grammar]),
        )
        if request.params.max_tokens <= (len(request.constraint.forced) if request.constraint is not None else 0):
            return
        self.requests[request.id] = request
        if stops == 0:
            stop = self.runner.first_token + 1
            request.is_stopped = lambda output: output[-1] == stop
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
        steps, landed = len(self.runner.plans), self.runner.landed
        for completion in self.engine.step():
            assert completion.id not in self.answers, "a row is answered twice"
            assert completion.id not in self.cancelled, "a cancelled row is answered"
            self.answers[completion.id] = completion
        launched = len(self.runner.plans) > steps
        if self.runner.depth == 1:
            assert launched == work, "an engine with work idles"
        assert (launched or self.runner.landed > landed) == work, "an engine with work idles"
        if launched:
            plan = self.runner.plans[-1]
            assert 0 < plan.num_tokens <= self.batch
            lanes = [*(s.lane for s in plan.rows), *plan.decode.tolist()]
            assert len(set(lanes)) == len(lanes), "a row is planned twice"
            assert len(self.engine.scheduler.running) <= self.most_running

    @rule(late=st.booleans())
    def failing_step(self, late: bool) -> None:
        """The step's launch fails, or the wait for it; so do those of bad rows from now on."""
        self.runner.fails_next, self.runner.fails_late = True, late
        self.step()
        self.runner.fails_next = False

    @rule(count=st.integers(2, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: hasattr(self, "engine"))
    @invariant()
    def sound(self) -> None:
        scheduler = self.engine.scheduler
        validate_invariants(scheduler)
        for user in scheduler.accounts.users.values():
            self.accounts.update(dict.fromkeys([user, *user.queries.values()]))

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
        wasted = 0
        for id_, completion in self.answers.items():
            request = self.requests[id_]
            run = self.runner.run_tokens[id_] - completion.computed_tokens - completion.recomputed_tokens
            if completion.finish_reason is FinishReason.ERROR:
                assert completion.error is not None
                if completion.error[0] == "LLM_ANSWER_INCOMPLETE":
                    grammar: Any = request.constraint
                    assert completion.output == self.runner.answer(request)
                    assert not grammar.is_done(completion.output)
                    continue
                assert completion.error[0] == "LLM_ENGINE_STEP_FAILED"
                failures = self.runner.failures[id_]  # one more where it was preempted before its step failed
                assert failures == 2 or failures > 2 == self.runner.depth, "a row is given up that has not failed alone"
                continue
            assert id_ not in self.runner.bad
            assert completion.output == self.runner.answer(request)
            assert completion.prompt_tokens == completion.cached_tokens + completion.computed_tokens
            assert completion.prompt_tokens == len(request.prompt)
            if request.constraint is not None:
                assert run >= 0
                continue
            decoded = len(completion.output) - 1
            most = decoded + (self.runner.depth - 1 if completion.finish_reason is FinishReason.STOP else 0)
            assert 0 <= run <= most, "tokens were run that no counter shows"
            if self.runner.first_token:  # no answer is found in a prompt's pages
                assert run >= decoded
                wasted += run - decoded
        stats = self.engine.stats()
        if self.runner.first_token and not self.cancelled and not stats.failed_steps:
            assert stats.wasted_tokens >= wasted
        parts = stats.prefill_tokens, stats.decode_tokens, stats.repeated_tokens, stats.wasted_tokens
        assert sum(parts) == stats.tokens, "tokens went through the model that no counter shows"
        self.check_charges()
        scheduler = self.engine.scheduler
        assert not scheduler.accounts.users
        assert not scheduler.running
        assert not scheduler.in_flight
        assert not len(scheduler.waiting)
        assert not scheduler._suspects
        assert scheduler.cache.tree.protected == 0
        scheduler.cache.clear()
        assert scheduler.cache.pool.free == scheduler.cache.pool.total

    def check_charges(self) -> None:
        """What was charged is what was settled; and where all rows were answered, what the answers show."""
        settled = self.engine.scheduler.charging.settled
        for kind in (UserAccount, QueryAccount):
            charged = sum(account.service for account in self.accounts if isinstance(account, kind))
            assert charged == settled, "charges are lost"
        done = self.answers.values()
        free = all(request.constraint is None for request in self.requests.values())  # what is forced costs less
        if free and not self.cancelled and all(c.finish_reason is not FinishReason.ERROR for c in done):
            prompts = sum(c.prompt_tokens if self.scheduler == "vtc" else c.computed_tokens for c in done)
            assert settled == prompts + 2 * sum(len(c.output) for c in done)


def test_engine_machine(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "PATIENCE", 2)  # rows make way for clients that are kept out
    monkeypatch.setattr(trust_module, "_WINDOW", 8)
    monkeypatch.setattr(trust_module, "_PAUSE", 6)
    monkeypatch.setattr(decoding_module, "_MOST_TOGETHER", 2)
    caplog.set_level(logging.CRITICAL, "spark_llm")
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))
