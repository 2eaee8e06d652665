"""DeduplicatePrompts: which calls fold, what is written into the plan, and how many calls are then made."""

from __future__ import annotations

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent, rows, settings, text
from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    view(echo)
    return echo


def view(spark: SparkSession) -> None:
    """t(id, k, text): 210 rows in 5 partitions, 30 pairs (k, text), every seventh text NULL."""
    spark.range(0, 210, 1, 5).selectExpr(
        "id", "id % 5 AS k", "if(id % 7 = 0, NULL, concat('text ', id % 6)) AS text"
    ).createOrReplaceTempView("t")


def test_the_plan_keeps_its_shape(t: SparkSession) -> None:
    query = "SELECT llm('p', text) AS a FROM t"
    settings(t, reorderRows_enabled=False)
    df = t.sql(query)
    settings(t, deduplicatePrompts_enabled=False)
    assert text(df) == text(t.sql(query))
    assert "Join" not in text(df)
    assert "Aggregate" not in text(df)


FOLDS = {
    "a plain call": ("llm('p', text)", True),
    "a seed without a temperature": ("llm('p', text, seed => 1)", True),
    "temperature 0": ("llm('p', text, temperature => 0)", True),
    "a temperature and a seed": ("llm('p', text, temperature => 0.5, seed => 1)", True),
    "as written": ("llm('p', text, order => 'as_written')", True),
    "no field": ("llm(text)", True),
    "drawn without a seed": ("llm('p', text, temperature => 0.5)", False),
}


@pytest.mark.parametrize(("call", "folds"), FOLDS.values(), ids=list(FOLDS))
def test_what_folds(t: SparkSession, call: str, folds: bool) -> None:
    df = t.sql(f"SELECT {call} FROM t")
    [plan] = rows(df)
    assert (plan.fold, plan.fold_why) == (folds, "" if folds else "drawn without a seed")
    assert_idempotent(df)


@pytest.mark.parametrize("key", ["deduplicatePrompts_enabled", "enabled"])
def test_settings_switch_it_off(t: SparkSession, key: str) -> None:
    settings(t, **{key: False})
    assert not any(plan.fold or plan.fold_why for plan in rows(t.sql("SELECT llm('p', text) FROM t")))


def test_it_holds_without_changing_prompts(t: SparkSession) -> None:
    settings(t, mayChangePrompts=False)
    assert [plan.fold for plan in rows(t.sql("SELECT llm('p', text) FROM t"))] == [True]


CALLS = {
    "a projection": ("SELECT llm('p', text, k) FROM t", 35),
    "filter and projection": ("SELECT llm('p', text, k) FROM t WHERE llm('p', text, k) < 'x'", 35),
    "a CTE used twice": ("WITH c AS (SELECT id, llm('p', text, k) r FROM t) SELECT * FROM c JOIN c d USING (id)", 35),
    "a union": ("SELECT llm('p', text, k) FROM t UNION ALL SELECT llm('p', text, k) FROM t WHERE k < 3", 35),
    "below ORDER BY": ("SELECT id, llm('p', text, k) r FROM t ORDER BY r, id", 35),
    "GROUP BY the answer": ("SELECT llm('p', text, k) r, count(*) FROM t GROUP BY 1", 35),
    "one field": ("SELECT llm('p', text) FROM t", 6),
    "a prompt alone": ("SELECT llm(text) FROM t", 6),
    "a constant": ("SELECT llm('p', 'x') FROM t", 1),
    "a user's partitions": ("SELECT llm('p', text, k) FROM (SELECT /*+ REPARTITION(4) */ * FROM t)", 35),
    "below LIMIT": ("SELECT llm('p', text, k) FROM t LIMIT 500", 35),
}


@pytest.mark.parametrize(("query", "calls"), CALLS.values(), ids=list(CALLS))
def test_equal_arguments_are_one_call_of_the_engine(model: FakeModel, query: str, calls: int) -> None:
    """30 pairs with a text and 5 with NULL; a call whose fields are all NULL is none."""
    view(model.spark)
    df = model.spark.sql(query)
    df.collect()
    assert len({request.exact for request in model.requests()}) == calls
    assert model.engine_calls() == calls
    if len(rows(df)) == 1 and rows(df)[0].partitions:
        assert len(model.requests()) == calls  # equal rows met in one task


def test_draws_without_a_seed_are_asked_row_by_row(model: FakeModel) -> None:
    view(model.spark)
    model.spark.sql("SELECT llm('p', k, temperature => 0.5) FROM t").collect()
    assert len(model.requests()) == 210
    assert {request.key for request in model.requests()} == {None}


def test_without_the_rule_every_row_is_a_call(model: FakeModel) -> None:
    view(model.spark)
    settings(model.spark, deduplicatePrompts_enabled=False)
    model.spark.sql("SELECT llm('p', k) FROM t").collect()
    assert len(model.requests()) == model.engine_calls() == 210


def test_calls_with_other_parameters_do_not_fold_into_each_other(model: FakeModel) -> None:
    view(model.spark)
    options = ("max_tokens => 2", "max_tokens => 3", "system => 's'", "stop => 'x'", "temperature => 0.5, seed => 1")
    columns = ", ".join(f"llm('p', k, {option})" for option in options)
    model.spark.sql(f"SELECT {columns} FROM t").collect()
    assert model.engine_calls() == 5 * len(options)


def test_null_and_the_text_null_are_other_arguments(model: FakeModel) -> None:
    df = model.spark.sql(
        "SELECT v, llm('p', v, w => 1) AS a FROM VALUES ('null'), (CAST(NULL AS STRING)), ('null'), ('') AS t(v)"
    )
    answers = {row.v: row.a for row in df.collect()}
    assert len(set(answers.values())) == 3
    assert model.engine_calls() == 3


def test_the_spec_in_explain_says_so(t: SparkSession) -> None:
    shown = t.sql("EXPLAIN SELECT llm('p', text) FROM t").first()
    assert shown is not None
    assert '"rows":{"fold":true' in shown[0]
