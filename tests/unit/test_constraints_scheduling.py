"""Constrained rows in the plans: held until their token is known, ahead by what is forced, right after rollbacks."""

from __future__ import annotations

import numpy as np
import pytest

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Completion, FinishReason, Request, SamplingParams
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

EOS = 90
TRIE = Labels(["one", "two", "three"], [(5, 6, 7, 8, 9), (5, 6, 7, 10), (11,)], [EOS])
STARTED = Labels(["one", "two"], [(5, 6, 7), (5, 6, 8)], [EOS])


def scheduler(pages: int = 64, *, batch: int = 64, running: int = 8) -> Scheduler:
    return Scheduler(CacheManager(pages, 1), LongestPrefixFirst(), max_batch_tokens=batch, max_running_rows=running)


def request(id_: int, constraint: Labels | None = None, max_tokens: int = 8) -> Request:
    prompt = np.array([20 + id_, 30, 31], np.int32)
    return Request(id_, prompt, SamplingParams(max_tokens=max_tokens), constraint=constraint)


def plan(s: Scheduler) -> StepPlan:
    planned = s.plan()
    validate_invariants(s)
    return planned


def commit(
    s: Scheduler, planned: StepPlan, tokens: list[int], log_probs: list[float] | None = None
) -> list[Completion]:
    given = None if log_probs is None else np.array(log_probs, np.float32)
    done = s.commit(planned, np.array(tokens, np.int32), frozenset({EOS}), given)
    validate_invariants(s)
    return done


def shares(planned: StepPlan) -> list[tuple[int, int, int]]:
    """(request id, first token, tokens) of each row of the plan."""
    return [(share.row.request.id, share.start, share.count) for share in planned.shares()]


def test_a_row_waits_for_its_token_while_others_go_on() -> None:
    """A free row is in every step, a constrained one in every other: what it may answer hangs on its last token."""
    s = scheduler()
    s.add(request(0, TRIE))
    s.add(request(1))
    first, second = plan(s), plan(s)
    assert {id_ for id_, _, _ in shares(first)} == {0, 1}
    assert [id_ for id_, _, _ in shares(second)] == [1]
    assert first.choices is not None
    assert first.choices.candidates.tolist() == [[5, 11]]
    assert second.choices is None
    order = [share.row.request.id for share in first.shares()]
    commit(s, first, [5 if id_ == 0 else 40 for id_ in order], [-0.5 if id_ == 0 else np.nan for id_ in order])
    third = plan(s)
    assert {id_ for id_, _, _ in shares(third)} == {0, 1}


def test_rows_that_come_later_fill_the_other_step() -> None:
    s = scheduler(batch=3)
    s.add(request(0, TRIE))
    s.add(request(1, TRIE))
    first, second, third = plan(s), plan(s), plan(s)
    assert [[id_ for id_, _, _ in shares(p)] for p in (first, second, third)] == [[0], [1], []]


def test_forced_tokens_are_computed_with_the_next_draw() -> None:
    s = scheduler()
    s.add(request(0, TRIE))
    commit(s, plan(s), [5], [-0.5])
    following = plan(s)
    assert shares(following) == [(0, 3, 3)], "5, and 6 and 7, which must follow"
    assert following.rows[0].row.tokens.tolist()[3:] == [5, 6, 7]
    assert following.choices is not None
    assert following.choices.candidates.tolist() == [[8, 10]]
    assert s.forced_tokens == 2
    (done,) = commit(s, following, [10], [-0.25])
    assert (done.output, done.text, done.finish_reason) == ([5, 6, 7, 10], "two", FinishReason.STOP)
    assert done.confidence == pytest.approx(np.exp(-0.75))
    assert (s.cache.available, s.lanes.num_constrained) == (64, 0)


def test_what_every_answer_begins_with_is_computed_with_the_prompt() -> None:
    s = scheduler()
    s.add(request(0, STARTED))
    first = plan(s)
    assert shares(first) == [(0, 0, 5)]
    assert first.choices is not None
    assert first.choices.candidates.tolist() == [[7, 8]]
    (done,) = commit(s, first, [8], [-0.1])
    assert (done.output, done.text, done.prompt_tokens, done.computed_tokens) == ([5, 6, 8], "two", 3, 3)


def test_forced_tokens_stop_at_the_limit() -> None:
    s = scheduler()
    s.add(request(0, TRIE, max_tokens=2))
    (done,) = commit(s, plan(s), [5], [-0.5])
    assert done.output == [5, 6]
    assert done.error == ("LLM_ANSWER_INCOMPLETE", {"kind": "choices", "max_tokens": "2"})
    assert (done.finish_reason, done.text, done.confidence) == (FinishReason.ERROR, None, None)


@pytest.mark.parametrize("preempt", [False, True])
def test_a_row_that_is_rolled_back_or_preempted_goes_on_where_it_was(preempt: bool) -> None:
    s = scheduler()
    s.add(request(0, TRIE))
    commit(s, plan(s), [5], [-0.5])
    if preempt:
        s.preempt(s.running[0])
    else:
        s.rollback(plan(s))
        validate_invariants(s)
    again = plan(s)
    assert again.choices is not None
    assert again.choices.candidates.tolist() == [[8, 10]]
    (done,) = commit(s, again, [8], [-0.25])
    assert (done.output, done.text) == ([5, 6, 7, 8], "one")
    assert done.confidence == pytest.approx(np.exp(-0.75))


def test_a_token_that_comes_after_its_row_has_left_is_not_taken() -> None:
    s = scheduler()
    s.add(request(0, TRIE))
    first = plan(s)
    row = s.running[0]
    s.cancel(0)
    assert commit(s, first, [5], [-0.5]) == []
    assert row.matcher is not None
    assert row.matcher.candidates is not None
    assert row.matcher.candidates.tolist() == [5, 11]
    assert s.lanes.num_constrained == 0


def test_free_rows_have_no_choices() -> None:
    s = scheduler()
    s.add(request(0))
    assert plan(s).choices is None
    assert not s.lanes.constrained.any()
