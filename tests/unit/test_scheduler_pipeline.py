"""Steps in flight: what is planned upon them, what late tokens and failures do, and what a decoding row costs."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Completion, Request, SamplingParams
from spark_llm.engine.scheduling.charging import Computed
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

EOS = 2


def scheduler(pages: int, *, batch: int = 64, page_size: int = 1, running: int = 8) -> Scheduler:
    return Scheduler(
        CacheManager(pages, page_size), LongestPrefixFirst(), max_batch_tokens=batch, max_running_rows=running
    )


def request(id_: int, prompt: list[int], max_tokens: int = 1) -> Request:
    return Request(id_, np.array(prompt, np.int32), SamplingParams(max_tokens=max_tokens))


def commit(s: Scheduler, plan: StepPlan, *tokens: int) -> list[Completion]:
    """tokens: of each sampling row in turn; one stands for all."""
    sampled = np.array(tokens if len(tokens) > 1 else tokens * plan.num_sampled, np.int32)
    return s.commit(plan, sampled, frozenset({EOS}))


def plan(s: Scheduler) -> StepPlan:
    planned = s.plan()
    validate_invariants(s)
    return planned


def shares(planned: StepPlan) -> list[tuple[int, int, int]]:
    """(request id, first token, tokens) of each row of the plan."""
    return [(share.row.request.id, share.start, share.count) for share in planned.shares()]


def test_a_row_decodes_before_its_token_is_known() -> None:
    s = scheduler(32)
    s.add(request(0, [1, 2, 3], max_tokens=3))
    first, second, third, nothing = plan(s), plan(s), plan(s), plan(s)
    assert [p.num_rows for p in (first, second, third, nothing)] == [1, 1, 1, 0]
    assert shares(first) == [(0, 0, 3)]
    assert not second.rows
    assert [int(p.positions[0]) for p in (second, third)] == [3, 4]
    assert not commit(s, first, 7)
    assert second.lanes.input_tokens(second.decode, second.positions).tolist() == [7]
    assert not commit(s, second, 8)
    assert [c.output for c in commit(s, third, 9)] == [[7, 8, 9]]
    assert s.charging.computed == Computed(prefill=3, decode=2)


def test_a_token_that_comes_after_the_end_of_its_row_is_dropped() -> None:
    """The row ends while its next step is in flight; its lane and its pages go to another row at once."""
    s = scheduler(8, running=1)
    s.add(request(0, [1, 2, 3], max_tokens=5))
    s.add(request(1, [4, 5, 6], max_tokens=5))
    first = plan(s)
    late = plan(s)
    assert [c.output for c in commit(s, first, EOS)] == [[EOS]]
    validate_invariants(s)
    assert s.cache.available == 8
    other = plan(s)
    assert shares(other) == [(1, 0, 3)]
    assert other.sampling.tolist() == late.decode.tolist()
    assert commit(s, late, 9) == []
    assert s.charging.computed == Computed(prefill=3, wasted=1)
    assert [row.output for row in s.running] == [[]]
    commit(s, other, 7)
    assert [row.output for row in s.running] == [[7]]


def test_a_launch_that_fails_leaves_the_step_before_it_in_flight() -> None:
    s = scheduler(32)
    s.add(request(0, [1, 2, 3], max_tokens=3))
    first = plan(s)
    s.add(request(1, [1, 2, 9], max_tokens=3))
    second = plan(s)
    assert shares(second) == [(1, 2, 1), (0, 3, 1)]
    assert {row.request.id for row in s.rollback(second)} == {0, 1}
    validate_invariants(s)
    assert plan(s).num_rows == 0, "suspects wait for what is in flight"
    commit(s, first, 7)
    validate_invariants(s)
    alone = [plan(s)]
    assert shares(alone[0]) == [(0, 3, 1)] or shares(alone[0]) == [(1, 2, 1)]
    commit(s, alone[0], 8)
    alone.append(plan(s))
    assert len(alone[1].shares()) == 1
    assert alone[0].shares()[0].row is not alone[1].shares()[0].row
    commit(s, alone[1], 8)
    assert sorted(row.output for row in s.running) == [[7, 8], [8]]
    assert [row.attempts for row in s.running] == [0, 0]


def test_a_step_that_fails_takes_along_what_was_planned_upon_it() -> None:
    """A row of the second step stands on a prefix that the first was to compute; it is not to blame."""
    s = scheduler(32)
    s.add(request(0, [1, 2, 3], max_tokens=3))
    first = plan(s)
    s.add(request(1, [1, 2, 9], max_tokens=3))
    second = plan(s)
    s.rollback(second, failed=False)
    validate_invariants(s)
    assert [row.request.id for row in s.rollback(first)] == [0]
    validate_invariants(s)
    assert s.cache.pool.free == 32
    assert not list(s.cache.tree.nodes())
    assert shares(plan(s)) == [(0, 0, 3)]  # alone
    commit(s, s.in_flight[0], 7)
    last = plan(s)
    assert sorted(shares(last)) == [(0, 3, 1), (1, 2, 1)]


@pytest.mark.parametrize("leave", ["cancel", "preempt"])
@pytest.mark.parametrize("fails", [False, True])
def test_pages_of_a_step_in_flight_stay_when_their_row_leaves(leave: str, fails: bool) -> None:
    s = scheduler(8)
    s.add(request(0, [1, 2, 3], max_tokens=3))
    first = plan(s)
    if leave == "cancel":
        s.cancel(0)
    else:
        s.preempt(s.running[0])
    validate_invariants(s)
    s.cache.clear()
    assert s.cache.tree.protected == 3, "a node was evicted that a step in flight fills"
    if fails:
        s.rollback(first)
        assert s.cache.pool.free == 8
    else:
        commit(s, first, 7)
        assert s.cache.tree.evictable == 3
    validate_invariants(s)
    if leave == "preempt":
        assert shares(plan(s)) == [(0, 0, 3) if fails else (0, 2, 1)]


def test_nobody_is_preempted_before_what_is_in_flight_is_done() -> None:
    s = scheduler(45)
    s.add(request(0, [1, 2, 3], max_tokens=40))
    s.add(request(1, [4, 5, 6], max_tokens=40))
    done: list[Completion] = []
    while len(s) or s.in_flight:
        flying, preemptions = len(s.in_flight), s.preemptions
        planned = plan(s)
        assert s.preemptions == preemptions or not flying
        if len(s.in_flight) == 2 or not planned.num_rows:
            done += commit(s, s.in_flight[0], 7)
    assert s.preemptions > 0
    assert sorted(c.id for c in done) == [0, 1]
    assert all(c.output == [7] * 40 for c in done)


@pytest.mark.parametrize("page_size", [1, 4])
def test_page_updates_tell_every_page_once(page_size: int) -> None:
    """Whoever applies them knows each lane's table, also after lanes have changed hands."""
    s = scheduler(200 // page_size, batch=20, page_size=page_size, running=5)
    for id_ in range(30):
        s.add(request(id_, [*range(id_ % 3, 12), 50 + id_], max_tokens=1 + id_ % 7))
    table = np.full((5, 20), -1, np.int32)
    told = 0
    while len(s):
        planned = s.plan()
        updates, at = planned.page_updates, 0
        for lane, first, count in zip(updates.lanes, updates.firsts, updates.counts, strict=True):
            table[lane, first : first + count] = updates.pages[at : at + count]
            at += count
        told += at
        for share in planned.shares():
            stop = -(-(share.start + share.count) // page_size)
            assert (table[share.lane, :stop] == share.row.pages[:stop]).all()
        commit(s, planned, 7)
    assert told <= sum(-(-(13 + 7) // page_size) for _ in range(30))


def test_pages_are_reserved_ahead_only_as_long_as_some_are_free() -> None:
    s = scheduler(100)
    s.add(request(0, [1, 2, 3], max_tokens=90))
    for _ in range(2):
        commit(s, s.plan(), 7)
    assert s.running[0].num_pages == 3 + 32
    held = s.cache.allocate(s.cache.pool.free)
    assert held is not None
    for _ in range(31):
        commit(s, s.plan(), 7)
    assert s.running[0].num_pages == 35
    s.cache.pool.release(held[:2])
    commit(s, s.plan(), 7)
    assert s.running[0].num_pages == 36
    s.cache.pool.release(held[2:])


def test_what_was_reserved_ahead_is_taken_back_before_a_row_is_preempted() -> None:
    s = scheduler(50)
    s.add(request(0, [1, 2, 3], max_tokens=30))
    for _ in range(2):
        commit(s, s.plan(), 7)
    s.add(request(1, [4, 5, 6], max_tokens=10))
    held = s.cache.allocate(s.cache.pool.free - 3)
    assert held is not None
    commit(s, s.plan(), 7)
    assert len(s.running) == 2
    assert s.cache.available == 0
    for _ in range(8):
        commit(s, s.plan(), 7)
    assert s.preemptions == 0
    s.cache.pool.release(held)
    validate_invariants(s)


def _lines_of_a_decode_step(rows: int) -> int:
    s = scheduler(rows * 40, batch=rows * 4, running=rows)
    for id_ in range(rows):
        s.add(request(id_, [id_ % 7, id_, 5], max_tokens=33))
    for _ in range(3):
        commit(s, s.plan(), 7)
    lines = 0

    def count(_frame: object, event: str, _argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    previous = sys.gettrace()
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        planned = s.plan()
        commit(s, planned, 7)
    finally:
        sys.settrace(previous)
    assert len(planned.decode) == rows
    return lines


def test_a_decoding_row_costs_no_python() -> None:
    assert _lines_of_a_decode_step(1000) == _lines_of_a_decode_step(10)
