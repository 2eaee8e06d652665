"""PlaceInstruction: where the instruction stands and why, how later calls are announced, and what prompts look like."""

from __future__ import annotations

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent, prompts, settings
from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    view(echo)
    return echo


def view(spark: SparkSession) -> None:
    """t: 120 rows; plots of 40 words, 12 of them; quotes are unique."""
    spark.range(0, 120, 1, 2).selectExpr(
        "id", "id % 12 AS k", "repeat(concat('plot ', id % 12, ' '), 20) AS plot", "concat('quote ', id) AS quote"
    ).createOrReplaceTempView("t")


SHARE = {
    "two questions": "SELECT llm('p', plot, quote), llm('q', plot, quote) FROM t",
    "fields listed in another order": "SELECT llm('p', plot, quote), llm('q', quote, plot) FROM t",
    "filter and projection": "SELECT llm('p', plot, quote) FROM t WHERE llm('q', plot, quote) = 'yes'",
    "a varying prompt": "SELECT llm(concat('p', k), plot, quote), llm('q', plot, quote) FROM t",
}


@pytest.mark.parametrize("query", SHARE.values(), ids=list(SHARE))
def test_last_where_calls_share_their_fields(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    found = prompts(df)
    assert [plan.instruction_last for plan in found] == [True, True]
    assert {plan.instruction_why for plan in found} == {"last: 2 calls share their fields"}
    assert [plan.later_calls for plan in found] == [1, 0]
    assert_idempotent(df)


def test_three_calls_count_down(t: SparkSession) -> None:
    df = t.sql("SELECT llm('a', plot), llm('b', plot) FROM t WHERE llm('c', plot) = 'x'")
    assert [plan.later_calls for plan in prompts(df)] == [2, 1, 0]


def test_equal_arguments_have_equal_prompts_wherever_they_stand(model: FakeModel) -> None:
    """A call in the filter is not the only one over its fields, although Spark moves the filter below other columns;
    nor is one over the same rows of another table."""
    view(model.spark)
    filtered = model.spark.sql("SELECT llm('a', plot), llm('b', plot) FROM t WHERE llm('a', plot) LIKE '%'")
    union = model.spark.sql(
        "SELECT llm('a', plot) FROM t WHERE id < 9 UNION ALL SELECT llm(q, plot) FROM t, (VALUES ('a'), ('b')) v(q)"
    )
    assert [plan.later_calls for plan in prompts(filtered)] == [1, 0]
    for df in (filtered, union):
        assert len({plan.instruction_last for plan in prompts(df)}) == 1
        model.forget()
        df.collect()
        assert len({request.exact for request in model.requests()}) == model.engine_calls() == 24
        assert_idempotent(df)


FIRST = {
    "one call": ("SELECT llm('p', plot) FROM t", "first: all rows share it"),
    "other fields": ("SELECT llm('p', plot), llm('q', quote) FROM t", "first: all rows share it"),
    "other names": ("SELECT llm('p', plot), llm('q', text => plot) FROM t", "first: all rows share it"),
    "another system text": ("SELECT llm('p', plot), llm('q', plot, system => 's') FROM t", "first: all rows share it"),
    "another model": ("SELECT llm('p', plot), llm('q', plot, model => 'm') FROM t", "first: all rows share it"),
    "the same call twice": ("SELECT llm('p', plot) FROM t WHERE llm('p', plot) = 'x'", "first: all rows share it"),
}


@pytest.mark.parametrize(("query", "why"), FIRST.values(), ids=list(FIRST))
def test_first_where_rows_share_it_alone(t: SparkSession, query: str, why: str) -> None:
    df = t.sql(query)
    assert {plan.instruction_why for plan in prompts(df)} == {why}
    assert not any(plan.instruction_last or plan.later_calls for plan in prompts(df))
    assert_idempotent(df)


def test_first_where_instructions_are_longer_than_the_fields(t: SparkSession) -> None:
    long = "Say whether this is good or bad or anything in between, and tell at length why you think so. " * 5
    df = t.sql(f"SELECT llm('{long}', quote), llm('{long} Really?', quote) FROM t")
    assert not any(plan.instruction_last for plan in prompts(df))
    assert prompts(df)[0].instruction_why.startswith("first: 2 calls share ")
    assert "but their instructions have" in prompts(df)[0].instruction_why
    short = t.sql("SELECT llm('a', quote), llm('b', quote) FROM t")
    assert all(plan.instruction_last for plan in prompts(short))


def test_a_prompt_that_varies_goes_last_where_contexts_repeat(t: SparkSession) -> None:
    """Retrieval: every row has a question of its own, and few contexts."""
    df = t.sql("SELECT llm(quote, plot) FROM t")
    [plan] = prompts(df)
    assert plan.instruction_last
    assert plan.instruction_why == "last: 120 different prompts, but 12 of plot"
    assert_idempotent(df)


def test_a_prompt_that_varies_stands_first_where_it_repeats(t: SparkSession) -> None:
    [plan] = prompts(t.sql("SELECT llm(plot, quote) FROM t"))
    assert not plan.instruction_last
    assert plan.instruction_why == "first: 12 different prompts in 120 rows, no field shares more"


def test_a_prompt_that_varies_stands_first_where_nothing_is_known(t: SparkSession) -> None:
    settings(t, statistics_enabled=False)
    [plan] = prompts(t.sql("SELECT llm(quote, plot) FROM t"))
    assert plan.instruction_why == "first: nothing is known of how often prompts repeat"


def test_a_field_that_says_little_does_not_move_a_prompt_that_repeats(t: SparkSession) -> None:
    for field in ("kind => 'film'", "fresh => id % 2 = 0"):
        [plan] = prompts(t.sql(f"SELECT llm(plot, quote, {field}) FROM t"))
        assert not plan.instruction_last, plan.instruction_why


ALONE = {
    "no field": "SELECT llm('p') FROM t",
    "order => 'as_written'": "SELECT llm(q, plot, order => 'as_written') FROM t, (VALUES ('a'), ('b')) v(q)",
}


@pytest.mark.parametrize("query", ALONE.values(), ids=list(ALONE))
def test_leaves_alone(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    assert not any(plan.instruction_last or plan.instruction_why for plan in prompts(df))
    assert_idempotent(df)


@pytest.mark.parametrize("key", ["mayChangePrompts", "placeInstruction_enabled", "enabled"])
def test_settings_switch_it_off(t: SparkSession, key: str) -> None:
    settings(t, **{key: False})
    assert not any(plan.instruction_last or plan.instruction_why for plan in prompts(t.sql(SHARE["two questions"])))


def test_prompts_begin_with_the_fields_and_later_calls_are_announced(model: FakeModel) -> None:
    view(model.spark)
    model.spark.sql("SELECT llm('p', quote, plot), llm('q', quote, plot, system => NULL) FROM t").collect()
    requests = model.requests()
    assert len(requests) == 240
    assert {request.instruction_segments for request in requests} == {0}
    assert {(request.segments[-1], request.later_calls) for request in requests} == {("p\n", 1), ("q\n", 0)}
    beginnings: dict[str, set[tuple[str, ...]]] = {"p\n": set(), "q\n": set()}
    for request in requests:
        beginnings[request.segments[-1]].add(request.segments[:-1])
    assert beginnings["p\n"] == beginnings["q\n"]


def test_system_text_stays_where_it_is(model: FakeModel) -> None:
    view(model.spark)
    model.spark.sql(
        "SELECT llm('p', plot, system => 'be short'), llm('q', plot, system => 'be short') FROM t"
    ).collect()
    assert {request.frame.split('"')[1] for request in model.requests()} == {"be short"}
    assert not any("short" in request.prompt for request in model.requests())
