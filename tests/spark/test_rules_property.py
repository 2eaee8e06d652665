"""The rules over random queries on random tables: plan rules change no prompt and no row, prompt rules no field.

The model is a fake that answers with a hash of the exact prompt, so that a row shows what was asked for it; for prompt
rules with a hash of the prompt's parts in any order.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
from fake_counting import FakeModel, Request
from hypothesis import HealthCheck, Phase, assume, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from plans import settings
from random_queries import Case, cases

pytestmark = pytest.mark.spark

LEARNING_CALLS = 64  # that a rule may spend to find out which of several conditions to ask first (CONTRACTS.md 11)

examples = hypothesis_settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an example takes seconds: what fails is not made smaller
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Outcome(NamedTuple):
    rows: list[str]
    requests: list[Request]
    engine_calls: int


def run(model: FakeModel, query: str) -> Outcome:
    model.forget()
    rows = [str(tuple(row)) for row in model.spark.sql(query).collect()]
    return Outcome(rows, model.requests(), model.engine_calls())


def on_and_off(model: FakeModel, case: Case, **prompts: bool) -> tuple[Outcome, Outcome]:
    """The query with the rules and without them."""
    settings(model.spark, enabled=True, **prompts)
    on = run(model, case.limited)
    settings(model.spark, enabled=False)
    return on, run(model, case.reference)


def same_rows(on: Outcome, off: Outcome, case: Case) -> bool:
    if case.limit:
        return len(on.rows) == min(case.limit, len(off.rows)) and not Counter(on.rows) - Counter(off.rows)
    return on.rows == off.rows if case.is_ordered else Counter(on.rows) == Counter(off.rows)


def exact(outcome: Outcome) -> set[tuple[object, ...]]:
    return {request.exact for request in outcome.requests}


def parts(request: Request) -> tuple[object, ...]:
    """The prompt as a bag of its lines."""
    return request.frame, tuple(sorted(request.segments))


@examples
@given(case=cases())
def test_plan_rules_keep_rows_and_prompts_and_never_call_more(model: FakeModel, case: Case) -> None:
    note(case.query)
    case.make(model.spark, 3)
    on, off = on_and_off(model, case, mayChangePrompts=False)
    assert same_rows(on, off, case)
    assert on.engine_calls == len(exact(on))
    if case.competes:
        assert on.engine_calls <= off.engine_calls + LEARNING_CALLS
    else:
        assert exact(on) <= exact(off)
        assert len(on.requests) <= len(off.requests)


@hypothesis_settings(examples, max_examples=6)
@given(case=cases())
def test_prompt_rules_keep_rows_and_fields(unordered_model: FakeModel, case: Case) -> None:
    note(case.query)
    model = unordered_model
    case.make(model.spark, 2)
    on, off = on_and_off(model, case, mayChangePrompts=True)
    assert same_rows(on, off, case)
    asked = {parts(request) for request in on.requests}
    assert case.competes or asked <= {parts(request) for request in off.requests}
    # Equal arguments have one prompt in a query, wherever and how often it is evaluated.
    assert len({(r.frame, r.prompt) for r in on.requests}) == len(asked)


@pytest.mark.slow
@hypothesis_settings(examples, max_examples=3)
@given(case=cases(), may_change=st.booleans())
def test_prompts_are_the_same_at_any_number_of_partitions(
    unordered_model: FakeModel, case: Case, may_change: bool
) -> None:
    assume(not case.competes and not case.limit)  # there, what is asked depends on what was answered first
    note(case.query)
    model = unordered_model
    settings(model.spark, enabled=True, mayChangePrompts=may_change)
    found = []
    for partitions in (1, 2, 7):
        case.make(model.spark, partitions)
        outcome = run(model, case.query)
        found.append((sorted(outcome.rows), {(r.frame, r.prompt) for r in outcome.requests}, outcome.engine_calls))
    assert found[0] == found[1] == found[2]
