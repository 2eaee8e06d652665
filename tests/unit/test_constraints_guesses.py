"""Constrained rows sampled without masks while steps are in flight: ahead like free ones, one token back if refused."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.constraints import trust as trust_module
from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.constraints.trust import Trust
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Completion, FinishReason, Request, SamplingParams
from spark_llm.engine.scheduling import decoding
from spark_llm.engine.scheduling.charging import Computed
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

EOS = 90
BANNED = 66  # never allowed
FORCES = 77  # must be followed by 78 and 79


class FakeGrammar:
    """Allows all but BANNED."""

    kind = "JSON schema"
    whole = False
    forced = ()

    def __init__(self) -> None:
        self.trust = Trust()

    def start(self, output: Any) -> FakeMatcher:
        return FakeMatcher(list(output))


class FakeMatcher:
    """See Matcher; it is its own masker."""

    candidates = text = confidence = error = state = None

    def __init__(self, output: list[int]) -> None:
        self.output = output

    @property
    def masker(self) -> FakeMatcher:
        return self

    @property
    def is_done(self) -> bool:
        return self.output[-1:] == [EOS]

    is_whole = is_done

    def offer(self, token: int) -> list[int] | None:
        return None if token == BANNED else self.take(token, 0.0)

    def take(self, token: int, log_prob: float) -> list[int]:
        assert token != BANNED
        forced = [78, 79] if token == FORCES else []
        self.output += [token, *forced]
        return forced


def scheduler(*, ahead: bool = True, running: int = 8, page_size: int = 1) -> Scheduler:
    cache = CacheManager(4096 // page_size, page_size)
    return Scheduler(cache, LongestPrefixFirst(), max_batch_tokens=64, max_running_rows=running, ahead=ahead)


def request(id_: int = 0, grammar: Any = None, max_tokens: int = 8, temperature: float = 0.0) -> Request:
    prompt = np.array([20 + id_, 30, 31], np.int32)
    return Request(id_, prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature), constraint=grammar)


def plan(s: Scheduler) -> StepPlan:
    planned = s.plan()
    validate_invariants(s)
    return planned


def commit(s: Scheduler, planned: StepPlan, *tokens: int) -> list[Completion]:
    """tokens: of each sampling row in turn; one stands for all."""
    sampled = np.array(tokens if len(tokens) > 1 else tokens * planned.num_sampled, np.int32)
    done = s.commit(planned, sampled, frozenset({EOS}))
    validate_invariants(s)
    return done


def shares(planned: StepPlan) -> list[tuple[int, int, int]]:
    """(request id, first token, tokens) of each row of the plan."""
    return [(share.row.request.id, share.start, share.count) for share in planned.shares()]


def started(page_size: int = 1, max_tokens: int = 8) -> tuple[Scheduler, StepPlan, StepPlan]:
    """A row with one token, and two steps in flight that go on with it."""
    s = scheduler(page_size=page_size)
    s.add(request(0, FakeGrammar(), max_tokens))
    first = plan(s)
    assert first.choices is not None, "after the prompt there is a mask"
    assert plan(s).num_rows == 0, "what may follow is not known"
    commit(s, first, 40)
    return s, plan(s), plan(s)


def test_allowed_tokens_cost_nothing_and_keep_nobody_waiting() -> None:
    s, second, third = started()
    assert [shares(p) for p in (second, third)] == [[(0, 3, 1)], [(0, 4, 1)]]
    assert (second.choices, third.choices) == (None, None)
    assert second.guessed.tolist() == [True]
    assert commit(s, second, 41) == []
    fourth = plan(s)
    assert shares(fourth) == [(0, 5, 1)]
    (done,) = commit(s, third, EOS)
    assert (done.output, done.finish_reason, done.recomputed_tokens) == ([40, 41, EOS], FinishReason.STOP, 0)
    commit(s, fourth, 50)
    assert s.charging.computed == Computed(prefill=3, decode=2, wasted=1), "as of a row that is free"
    assert s.charging.settled == 3 + 2 * 3
    assert s.refused_tokens == 0


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_refused_token_takes_its_row_back_by_one(page_size: int) -> None:
    s, second, third = started(page_size)
    assert commit(s, second, BANNED) == []
    again = plan(s)
    assert shares(again) == [(0, 3, 1)], "the last known token"
    assert again.choices is not None
    assert again.choices.masked.tolist() == [0]
    assert again.rows[0].row.tokens.tolist()[3:] == [40]
    assert commit(s, third, 50) == [], "what was sampled upon the refused token is dropped"
    assert plan(s).num_rows == 0, "its mask would hang on a token that is not known"
    commit(s, again, 41)
    fourth, fifth = plan(s), plan(s)
    assert [shares(p) for p in (fourth, fifth)] == [[(0, 4, 1)], [(0, 5, 1)]], "and it is ahead again"
    assert fourth.choices is None
    (done,) = commit(s, fourth, EOS)
    assert (done.output, done.recomputed_tokens) == ([40, 41, EOS], 1)
    commit(s, fifth, 50)
    assert s.charging.computed == Computed(prefill=3, decode=2, recomputed=1, wasted=2)
    assert s.charging.settled == 3 + 2 * 3, "refused tokens are not charged"
    assert s.refused_tokens == 1
    assert (s.cache.available, s.lanes.num_constrained) == (s.cache.pool.total, 0)


def test_what_is_forced_takes_back_what_is_in_flight() -> None:
    s, second, third = started()
    commit(s, second, FORCES)
    forced = plan(s)
    assert shares(forced) == [(0, 4, 3)]
    assert forced.rows[0].row.tokens.tolist()[3:] == [40, FORCES, 78, 79]
    assert forced.choices is None
    assert commit(s, third, BANNED) == []
    (done,) = commit(s, forced, EOS)
    assert done.output == [40, FORCES, 78, 79, EOS]
    assert s.charging.computed == Computed(prefill=3, decode=4, wasted=1)
    assert (s.forced_tokens, s.refused_tokens) == (2, 0)


@pytest.mark.parametrize("token", [BANNED, FORCES])
@pytest.mark.parametrize("what", ["cancel", "preempt", "rollback", "late failure"])
def test_a_row_that_went_back_may_leave_or_fail(what: str, token: int) -> None:
    s, second, third = started()
    commit(s, second, token)
    known = s.running[0].output
    if what == "late failure":
        s.rollback(plan(s), failed=False)
        assert s.rollback(third) == [], "what was planned upon the token is not the row's any more"
        validate_invariants(s)
    else:
        commit(s, third, 50)
    if what == "cancel":
        s.cancel(0)
        validate_invariants(s)
        assert s.cache.available == s.cache.pool.total
        return
    if what == "preempt":
        s.preempt(s.running[0])
    if what == "rollback":
        s.rollback(plan(s))
    validate_invariants(s)
    again = plan(s)
    assert (again.choices is not None) == (token == BANNED), "the token that was refused once has a mask now"
    assert again.rows[0].start + again.rows[0].count == 3 + len(known)
    (done,) = commit(s, again, EOS)
    assert done.output == [*known, EOS]


def test_a_token_is_refused_whose_next_step_was_rolled_back() -> None:
    s, second, third = started()
    s.rollback(third)
    validate_invariants(s)
    commit(s, second, BANNED)
    again = plan(s)
    assert shares(again) == [(0, 3, 1)]
    assert again.choices is not None
    (done,) = commit(s, again, EOS)
    assert done.output == [40, EOS]


def test_the_last_token_may_be_refused() -> None:
    s, second, third = started(max_tokens=2)
    assert third.num_rows == 0
    assert commit(s, second, BANNED) == []
    (done,) = commit(s, plan(s), EOS)
    assert done.output == [40, EOS]


@pytest.mark.parametrize(
    ("ahead", "temperature", "constraint"),
    [(True, 1.0, FakeGrammar()), (False, 0.0, FakeGrammar()), (True, 0.0, Labels(["a", "b"], [(5, 6), (7, 8)], [EOS]))],
    ids=["drawn", "nothing in flight", "choices"],
)
def test_other_rows_have_masks_or_lists(ahead: bool, temperature: float, constraint: Any) -> None:
    s = scheduler(ahead=ahead)
    s.add(request(0, constraint, temperature=temperature))
    first = plan(s)
    assert first.choices is not None
    if not isinstance(constraint, Labels):
        commit(s, first, 40)
        assert plan(s).choices is not None
    assert plan(s).num_rows == 0


def test_a_grammar_that_refuses_much_gets_masks_and_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_module, "_WINDOW", 20)
    monkeypatch.setattr(trust_module, "_PAUSE", 6)
    s, grammar = scheduler(), FakeGrammar()
    s.add(request(0, grammar, max_tokens=40))
    seen = []
    while grammar.trust.guesses and len(seen) < 60:
        planned = plan(s)
        seen.append(planned.choices is None)
        commit(s, planned, BANNED if planned.choices is None else 40)
    assert seen.count(True) == 5, "the fifth refusal is more than a fifth of the window"
    for _ in range(6):
        assert not grammar.trust.guesses
        planned = plan(s)
        assert planned.choices is not None
        commit(s, planned, 40)
    assert grammar.trust.guesses


def test_a_row_whose_guesses_are_refused_one_after_the_other_makes_fewer() -> None:
    s = scheduler()
    s.add(request(0, FakeGrammar(), max_tokens=80))

    def masks() -> int:
        """Steps with masks up to the next one without."""
        count = 0
        while (planned := plan(s)).choices is not None:
            commit(s, planned, 40)
            count += 1
        commit(s, planned, token)
        return count

    token = BANNED
    assert [masks() for _ in range(7)] == [1, 1, 2, 4, 8, 16, 16]
    token = 41
    assert masks() == 16
    token = BANNED
    assert [masks() for _ in range(3)] == [0, 1, 2]


def test_old_refusals_fade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_module, "_WINDOW", 20)
    trust = Trust()
    for token in range(400):
        trust.guessed(refused=token % 10 == 0)
    assert trust.guesses


def test_many_rows_that_wait_go_in_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_TOGETHER", 4)
    s = scheduler()
    for id_ in range(6):
        s.add(request(id_, FakeGrammar(), temperature=1.0))
    commit(s, plan(s), 40)
    first, second = plan(s), plan(s)
    halves = [{id_ for id_, _, _ in shares(p)} for p in (first, second)]
    assert [len(half) for half in halves] == [3, 3]
    assert halves[0] | halves[1] == set(range(6))
    for _ in range(3):
        commit(s, first, 40)
        first, second = second, plan(s)
        assert {id_ for id_, _, _ in shares(second)} == halves[0]
        halves.reverse()


def test_few_rows_that_wait_go_together() -> None:
    s = scheduler()
    for id_ in range(6):
        s.add(request(id_, FakeGrammar(), temperature=1.0))
    commit(s, plan(s), 40)
    assert plan(s).num_rows == 6
    assert cast(Any, s)._decoding.in_flight is s.in_flight
