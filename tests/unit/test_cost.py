"""The cost model's arithmetic: bounds stay bounds, sources their weakest, unknown stays unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_llm.optimizer.cost import (
    NONE,
    UNKNOWN,
    CallCost,
    CallInput,
    Number,
    Speed,
    about,
    ask_seconds,
    at_most,
    call_cost,
    exact,
    move_seconds,
    smaller,
    sum_of_costs,
    total,
)

SPEED = Speed(1000.0, True)

numbers = st.one_of(
    st.just(UNKNOWN),
    st.builds(
        Number,
        st.floats(0, 1e9),
        st.sampled_from(["job", "catalog", "measured", "plan", "guess"]),
        st.sampled_from(["exact", "about", "at most"]),
    ),
)


@given(numbers, numbers)
def test_a_result_is_as_weak_as_its_weakest_part(one: Number, other: Number) -> None:
    for found in (one.times(other), one.plus(other)):
        if one.value is None or other.value is None:
            assert found == UNKNOWN
        else:
            assert found.is_counted == (one.is_counted and other.is_counted)
            assert (found.kind == "exact") == (one.kind == other.kind == "exact")
            assert (found.kind == "at most") == ("at most" in (one.kind, other.kind))


@given(numbers, numbers)
def test_the_smaller_of_two_is_never_more_than_either(one: Number, other: Number) -> None:
    found = smaller(one, other)
    known = [number.value for number in (one, other) if number.value is not None]
    assert found.value == min(known, default=None)
    if len(known) == 1:
        assert found.kind == "at most"


@given(numbers, numbers)
def test_what_is_left_of_a_number_is_no_bound_unless_what_goes_is_sure(one: Number, other: Number) -> None:
    left = one.minus(other)
    assert left.value is None or left.value >= 0
    if other.kind == "at most":
        assert left.kind == "about"


def test_how_numbers_read() -> None:
    assert [str(n) for n in (exact(4866, "job"), at_most(4866, "job"), about(4866, "guess"), UNKNOWN)] == [
        "4,866",
        "<= 4,866",
        "~ 4,866",
        "?",
    ]
    assert str(about(0.1234, "measured")) == "~ 0.12"


def test_a_call_of_which_everything_is_known() -> None:
    known = CallInput(
        rows=exact(100, "job"),
        distinct=exact(80, "job"),
        field_tokens=about(50, "job"),
        shared=about(0.6, "job"),
        head=20,
        tail=5,
        max_output=4,
    )
    cost = call_cost(known, SPEED)
    assert (cost.calls, cost.calls.is_counted) == (exact(80, "job"), True)
    assert cost.prompt_tokens == about(80 * 75, "job")
    # 100 x 50 x 0.4 of fields, 80 tails, one head.
    assert cost.hits.value == pytest.approx(80 * 75 - (2000 + 400 + 20))
    assert cost.output_tokens == at_most(320, "job")
    assert cost.computed_tokens.value == pytest.approx(2420 + 320)
    assert cost.seconds.value == pytest.approx(2.74)
    assert cost.seconds.source == "measured"


def test_rows_that_fold_are_computed_as_often_as_without_folding() -> None:
    known = {"rows": exact(100, "job"), "field_tokens": about(50, "job"), "shared": about(0.6, "job")}
    folded = call_cost(CallInput(**known, distinct=exact(80, "job")), SPEED)
    asked = call_cost(CallInput(**known, distinct=exact(80, "job"), folds=False), SPEED)
    assert (folded.calls, asked.calls) == (exact(80, "job"), exact(100, "job"))
    assert folded.hits.value is not None
    assert asked.hits.value is not None
    assert asked.hits.value > folded.hits.value


def test_a_mask_makes_calls_a_bound() -> None:
    cost = call_cost(CallInput(rows=exact(100, "job"), asked=at_most(100, "job"), distinct=exact(80, "job")), SPEED)
    assert cost.calls == at_most(80, "job")
    assert not cost.calls.is_counted


def test_what_is_not_known_stays_unknown() -> None:
    cost = call_cost(CallInput(rows=exact(100, "job"), max_output=4), SPEED)
    assert cost.calls == at_most(100, "job")
    assert cost.output_tokens == at_most(400, "job")
    assert cost.prompt_tokens == cost.hits == cost.seconds == UNKNOWN
    assert cost.hit_rate is None
    assert call_cost(CallInput(), SPEED).calls == UNKNOWN


def test_no_call_costs_nothing_whatever_is_not_known() -> None:
    cost = call_cost(CallInput(rows=exact(0, "job"), max_output=4), SPEED)
    assert cost.seconds == cost.prompt_tokens == cost.output_tokens == exact(0, "job")


def test_the_speed_is_a_guess_until_it_is_measured() -> None:
    tokens = exact(10_000, "job")
    assert Speed().seconds(tokens) == about(10, "guess")
    assert Speed(500, True, engines=4).seconds(tokens) == about(5, "measured")


@given(
    rows=st.integers(1, 10_000),
    distinct=st.integers(1, 10_000),
    fields=st.floats(0, 1000),
    shared=st.floats(0, 1),
    engines=st.integers(1, 16),
)
def test_hits_and_misses_make_the_prompt(rows: int, distinct: int, fields: float, shared: float, engines: int) -> None:
    known = CallInput(
        rows=exact(rows, "job"),
        distinct=exact(min(rows, distinct), "job"),
        field_tokens=about(fields, "job"),
        shared=about(shared, "job"),
        max_output=8,
    )
    cost = call_cost(known, Speed(engines=engines))
    assert cost.hit_rate is not None
    assert 0 <= cost.hit_rate <= 1
    assert cost.prompt_tokens.value is not None
    assert cost.hits.value is not None
    missed = cost.prompt_tokens.value - cost.hits.value
    assert cost.computed_tokens.value == pytest.approx(missed + 8 * min(rows, distinct))


def test_costs_add_up() -> None:
    assert total([]) == NONE
    both = sum_of_costs([CallCost(rows=exact(1, "job"), calls=exact(1, "job")), CallCost(rows=at_most(2, "catalog"))])
    assert both.rows == at_most(3, "catalog")
    assert both.calls == UNKNOWN


def test_calls_and_moved_rows_have_one_unit() -> None:
    assert ask_seconds(100, 50, Speed(1000, True, engines=2)) == 2.5
    assert move_seconds(1e6, 100, 2) > move_seconds(1e6, 100, 4) > move_seconds(0, 100, 4) > 0
    assert move_seconds(10, None, 1) < move_seconds(10_000_000, None, 1)
