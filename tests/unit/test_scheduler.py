"""Single behaviours of the scheduler: what a step reserves, and what a rollback gives back."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Client, Completion, FinishReason, Request, SamplingParams
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.policies import waiting_queue
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst, WaitingQueue

NO_EOS: frozenset[int] = frozenset()


def scheduler(
    pages: int, *, batch: int = 64, page_size: int = 1, running: int = 8, queue: WaitingQueue | None = None
) -> Scheduler:
    queue = LongestPrefixFirst() if queue is None else queue
    return Scheduler(CacheManager(pages, page_size), queue, max_batch_tokens=batch, max_running_rows=running)


def request(id_: int, prompt: list[int], max_tokens: int = 1, *, reuse: bool = True) -> Request:
    return Request(id_, np.array(prompt, np.int32), SamplingParams(max_tokens=max_tokens), reuse=reuse)


def commit(s: Scheduler, plan: StepPlan, token: int = 7) -> list[Completion]:
    return s.commit(plan, np.full(plan.num_sampled, token, np.int32), NO_EOS)


def shares(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(request id, first token, tokens) of each row of the plan."""
    return [(s.row.request.id, s.start, s.count) for s in plan.shares()]


def states(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(row.request.id, row.state(), row.pages[: row.num_pages].tolist()) for row in rows]


def test_rows_of_one_step_share_a_prefix_that_this_step_computes() -> None:
    s = scheduler(64)
    for id_ in range(3):
        s.add(request(id_, [*range(10), 50 + id_]))
    plan = s.plan()
    assert shares(plan) == [(0, 0, 11), (1, 10, 1), (2, 10, 1)]
    done = commit(s, plan)
    assert [(c.cached_tokens, c.computed_tokens) for c in done] == [(0, 11), (10, 1), (10, 1)]


def test_equal_prompts_compute_their_last_token_each() -> None:
    s = scheduler(64)
    for id_ in range(2):
        s.add(request(id_, [1, 2, 3], max_tokens=2))
    plan = s.plan()
    assert shares(plan) == [(0, 0, 3), (1, 2, 1)]
    commit(s, plan)
    validate_invariants(s)
    commit(s, s.plan())
    assert len(s) == 0


def test_a_preempted_row_looks_for_its_prefix_again() -> None:
    s = scheduler(64)
    for id_ in range(2):
        s.add(request(id_, [1, 2, 3, 4], max_tokens=3))
    commit(s, s.plan())
    twin = s.running[1]
    assert twin.detached
    s.preempt(twin)
    assert not twin.detached
    plan = s.plan()
    assert shares(plan) == [(1, 4, 1), (0, 4, 1)]  # the other row's page of token 3 serves both now
    commit(s, plan)
    assert (twin.cached, twin.computed, twin.recomputed) == (3, 1, 0)
    validate_invariants(s)


@pytest.mark.parametrize("page_size", [1, 4])
def test_whole_prompt_pages_stay_and_answers_do_not(page_size: int) -> None:
    s = scheduler(64, page_size=page_size)
    s.add(request(0, list(range(10)), max_tokens=9))
    while len(s):
        commit(s, s.plan())
    assert [node.end for node in s.cache.tree.nodes()] == [10 // page_size * page_size]
    assert s.cache.pool.free == 64 - 10 // page_size


def test_without_reuse_nothing_is_matched_and_nothing_stays() -> None:
    s = scheduler(64)
    for id_ in range(2):
        s.add(request(id_, [1, 2, 3, 4], reuse=False))
    plan = s.plan()
    assert shares(plan) == [(0, 0, 4), (1, 0, 4)]
    commit(s, plan)
    assert s.cache.pool.free == 64
    assert not list(s.cache.tree.nodes())


def test_a_prompt_is_cut_into_chunks_and_the_next_row_waits_for_the_budget() -> None:
    s = scheduler(64, batch=4)
    s.add(request(0, list(range(10))))
    s.add(request(1, [*range(9), 77, 78]))
    seen = []
    while len(s):
        plan = s.plan()
        seen.append(shares(plan))
        commit(s, plan)
        validate_invariants(s)
    assert seen == [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2), (1, 9, 2)]]


def test_the_row_admitted_last_is_preempted_and_loses_nothing() -> None:
    s = scheduler(45)  # both are let in, as answers are expected to end early; these do not
    s.add(request(0, [1, 2, 3], max_tokens=41))
    s.add(request(1, [4, 5, 6], max_tokens=40))
    done: list[Completion] = []
    while len(s):
        done += commit(s, s.plan())
        validate_invariants(s)
    assert s.preemptions > 0
    assert sorted(c.id for c in done) == [0, 1]
    for c in done:
        assert c.output == [7] * (41 - c.id)
        assert (c.cached_tokens, c.computed_tokens) == (0, 3)
        assert (c.recomputed_tokens > 0) == (c.id == 1)


def test_a_row_as_long_as_the_pool_runs_alone() -> None:
    s = scheduler(4, page_size=4, batch=5)
    s.add(request(0, list(range(12)), max_tokens=5))  # 16 tokens of K/V: the last one is never fed back
    s.add(request(1, [99] * 3, max_tokens=2))
    done: list[Completion] = []
    while len(s):
        done += commit(s, s.plan())
        validate_invariants(s)
    assert sorted(c.id for c in done) == [0, 1]


def test_cancel_frees_a_running_and_a_waiting_row() -> None:
    s = scheduler(6)
    s.add(request(0, [1, 2, 3, 4], max_tokens=2))
    s.add(request(1, [5, 6, 7, 8], max_tokens=2))
    commit(s, s.plan())
    assert len(s.running) == 1
    assert s.cancel(0)
    assert s.cancel(1)
    assert not s.cancel(1)
    assert len(s) == 0
    validate_invariants(s)
    assert s.cache.available == 6


def test_rollback_leaves_rows_queue_and_index_as_they_were() -> None:
    s = scheduler(32, batch=8)
    s.add(request(0, list(range(12)), max_tokens=3))
    commit(s, s.plan())
    s.add(request(1, [*range(12), 5]))
    s.add(request(2, [*range(6), 9]))
    running = list(s.running)
    before = states(running)
    nodes = [(n.end, n.pages.tolist()) for n in s.cache.tree.nodes()]
    plan = s.plan()
    assert plan.num_rows == 3
    s.rollback(plan)
    validate_invariants(s)
    assert states(running) == before
    assert s.running == running
    assert len(s.waiting) == 2
    assert sum(end for end, _ in nodes) == 8
    assert max(n.end for n in s.cache.tree.nodes()) == 8
    assert s.cache.pool.free == 32 - 8


def test_rows_of_a_failed_step_run_alone_until_they_succeed_and_only_then_together() -> None:
    s = scheduler(64)
    for id_ in range(3):
        s.add(request(id_, [id_, 1, 2], max_tokens=2))
    s.rollback(s.plan())
    assert len(s.running) == 0
    alone = []
    for _ in range(3):
        plan = s.plan()
        alone += [[share[0] for share in shares(plan)]]
        commit(s, plan)
    assert sorted(alone) == [[0], [1], [2]]
    assert all(row.attempts == 0 for row in s.running)
    assert s.plan().num_rows == 3


def test_a_row_that_gave_way_after_a_match_can_still_be_rolled_back() -> None:
    """Pages run out after a row adopted what its own step plans: its state of before the step is the older one."""
    prefix = list(range(34))
    s = scheduler(80, batch=12)
    s.add(request(0, prefix))
    while len(s):
        commit(s, s.plan())
    s.add(request(1, [90] * 8, max_tokens=9))
    s.add(request(2, [*prefix, 2]))
    s.add(request(3, [*prefix, 3]))
    plan = s.plan()
    assert sorted(share[0] for share in shares(plan)) == [1, 2, 3]
    s.rollback(plan)
    s.cache.clear()  # the shared prefix is evicted: rows that run alone have to begin anew
    for _ in range(3):
        commit(s, s.plan())
    while s.running[-1].request.id != 1:  # the row that gives way shall be the one that shares nothing
        first = s.running[0]
        rows = s._running.rows
        rows[first] = rows.pop(first)
    lacking = s.running[:-1]
    assert [row.remaining > 1 for row in lacking] == [True, True]
    held = s.cache.allocate(s.cache.available - 11)  # what the first row lacks; then there is none for the second
    assert held is not None
    before = states(lacking)
    plan = s.plan()
    assert s.preemptions == 1
    s.rollback(plan)
    assert [state[1][:5] for state in states(lacking)] == [state[1][:5] for state in before]  # type: ignore[index]
    s.cache.pool.release(held)
    validate_invariants(s)


def test_an_empty_scheduler_plans_nothing() -> None:
    assert scheduler(4).plan().num_rows == 0


@pytest.mark.parametrize("kind", ["shared", "unrelated"])
def test_the_cost_of_a_step_does_not_grow_with_what_waits(kind: str) -> None:
    """Counted: Python lines run and key comparisons made, with 1,000 and with 100,000 waiting rows."""
    few, many = (_cost_of_steps(waiting, kind) for waiting in (1_000, 100_000))
    assert many["lines"] <= 1.5 * few["lines"], (few, many)
    assert many["comparisons"] <= 2.5 * few["comparisons"], (few, many)  # log2(100,000) / log2(1,000) = 1.7


@pytest.mark.parametrize("name", ["dlpm", "vtc"])
def test_the_cost_of_a_step_does_not_grow_with_the_clients(name: str) -> None:
    """The same with 10 and with 2,000 clients, each of which has rows waiting, and may pay for two at a time."""
    few, many = (_cost_of_steps(8_000, "shared", name=name, clients=clients) for clients in (10, 2_000))
    assert many["lines"] <= 1.7 * few["lines"], (few, many)
    assert many["comparisons"] <= 3.4 * few["comparisons"], (few, many)  # log2(2,000) / log2(10) = 3.3


class CountingKey(bytes):
    """A sort key that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: bytes) -> bool:
        CountingKey.compared += 1
        return bytes.__lt__(self, other)

    def __eq__(self, other: object) -> bool:
        CountingKey.compared += 1
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


def _cost_of_steps(
    waiting: int, kind: str, steps: int = 20, *, name: str = "lpm", clients: int = 1
) -> dict[str, float]:
    s = scheduler(600, batch=64, running=16, queue=waiting_queue(name, 20.0))
    random = np.random.default_rng(0)
    push: Callable[[Row], None] = s.waiting.push

    def push_counting(row: Row) -> None:
        row.key = CountingKey(row.key)
        push(row)

    s.waiting.push = push_counting  # type: ignore[method-assign]
    for id_ in range(waiting):
        group = id_ % (waiting // 8) if kind == "shared" else id_
        prompt = [group // 256, group % 256, *range(8), *random.integers(0, 50, 4).tolist()]
        asked = request(id_, prompt, max_tokens=2)
        asked.client = Client(f"user {id_ * clients // waiting}")
        s.add(asked)
    for _ in range(3):
        commit(s, s.plan())
    lines = 0

    def count(_frame: object, event: str, _argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    CountingKey.compared = 0
    rows = 0
    previous = sys.gettrace()
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        for _ in range(steps):
            plan = s.plan()
            rows += plan.num_rows
            commit(s, plan)
    finally:
        sys.settrace(previous)
    assert rows > 5 * steps
    return {"lines": lines / rows, "comparisons": CountingKey.compared / rows}


def test_a_stop_callback_ends_the_row_and_an_end_token_too() -> None:
    s = scheduler(32)
    stopping = request(0, [1, 2], max_tokens=9)
    stopping.is_stopped = lambda output: len(output) == 2
    s.add(stopping)
    s.add(request(1, [3, 4], max_tokens=9))
    done: list[Completion] = []
    while len(s):
        plan = s.plan()
        done += commit(s, plan, 5)
        if len(done) == 1 and len(s):
            plan = s.plan()
            done += s.commit(plan, np.array([6], np.int32), frozenset({6}))
    assert [(c.id, c.output, c.finish_reason) for c in done] == [
        (0, [5, 5], FinishReason.STOP),
        (1, [5, 5, 6], FinishReason.STOP),
    ]
