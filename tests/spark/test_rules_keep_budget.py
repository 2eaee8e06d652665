"""KeepBudget: what engines may spend stands in every call, and what was counted and is beyond it does not begin."""

from __future__ import annotations

import sys

import pytest
from fake_counting import FakeModel
from plans import apply, assert_idempotent, optimized, planner, settings, spark_jobs, specs
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

import spark_llm
from spark_llm.call import Budget
from spark_llm.functions.planning import enabled_rules
from spark_llm.optimizer.cost import UNKNOWN, about, at_most, exact
from spark_llm.optimizer.rules.keep_budget import engine_share, is_beyond

pytestmark = pytest.mark.spark

TEXTS = "SELECT id, id % 4 AS k, concat('a longer text ', id % 20) AS text FROM range(0, 200, 1, 2)"


@pytest.fixture
def t(model: FakeModel) -> FakeModel:
    """t(id, k, text): 200 rows, 20 texts."""
    model.spark.sql(TEXTS).createOrReplaceTempView("t")
    settings(model.spark, statistics_timeout="2min")  # on a busy machine
    return model


def budget(spark: SparkSession, **limits: object) -> None:
    for name, value in limits.items():
        spark.conf.set(f"spark.llm.budget.{name}", str(value))


def refused(spark: SparkSession, query: str) -> str:
    with pytest.raises(AnalysisException) as raised:
        spark.sql(query).collect()
    assert raised.value.getCondition() == "LLM_BUDGET_EXCEEDED"
    return str(raised.value)


# What is written


def test_every_call_has_the_budget(t: FakeModel) -> None:
    spark = t.spark
    queries = [
        "SELECT llm('p', text), llm('q', text) FROM t",
        "SELECT id FROM t WHERE llm('p', text) = 'x' AND llm('q', text, k) = 'y' LIMIT 3",
        "SELECT (SELECT max(llm('p', text)) FROM t), llm('q', k) FROM t",
    ]
    for query in queries:
        assert all(spec.budget is None for spec in specs(spark.sql(query)))
    budget(spark, maxCalls=1000, maxTime="90s", onExceeded="partial")
    for query in queries:
        df = spark.sql(query)
        assert [spec.budget for spec in specs(df)] == [Budget(calls=1000, seconds=90.0, partial=True)] * 2
        assert_idempotent(df)


def test_a_budget_holds_without_any_other_rule(t: FakeModel) -> None:
    settings(t.spark, enabled=False)
    budget(t.spark, maxCalls=1000)
    # aggregates are a plan, with or without optimizing
    assert enabled_rules(spark_llm.config.from_session(t.spark)) == {"keepBudget", "llmAggregates"}
    [spec] = specs(t.spark.sql("SELECT llm('p', text) FROM t"))
    assert spec.budget == Budget(calls=1000)


def test_the_answers_stay_as_they_are_within_the_budget(t: FakeModel) -> None:
    query = "SELECT id, llm('p', text) AS a FROM t"
    before = t.spark.sql(query).collect()
    budget(t.spark, maxCalls=20)
    assert sorted(t.spark.sql(query).collect()) == sorted(before)


def test_an_engine_s_share() -> None:
    whole = Budget(calls=10, length=1001, seconds=60.0, partial=True)
    assert engine_share(whole, 1) == whole
    assert engine_share(whole, 4) == Budget(calls=3, length=251, seconds=60.0, partial=True)
    assert engine_share(Budget(seconds=1.0), 4) == Budget(seconds=1.0)


# What is refused


def test_counted_calls_beyond_the_budget_are_not_begun(t: FakeModel) -> None:
    budget(t.spark, maxCalls=19)
    message = refused(t.spark, "SELECT llm('p', text) FROM t")
    assert "spark.llm.budget.maxCalls = 19" in message
    assert "it would make 20 calls by an estimate, which leaves the result cache out" in message
    assert t.engine_calls() == 0
    budget(t.spark, maxCalls=20)
    assert t.spark.sql("SELECT llm('p', text) FROM t").count() == 200


def test_all_calls_of_the_query_count_together(t: FakeModel) -> None:
    budget(t.spark, maxCalls=30)
    t.spark.sql("SELECT llm('p', text) FROM t").collect()
    asked = t.engine_calls()
    assert "it would make 40 calls" in refused(t.spark, "SELECT llm('p', text), llm('q', text) FROM t")
    assert "it would make 40 calls" in refused(
        t.spark, "SELECT (SELECT max(llm('p', text)) FROM t), llm('q', text) FROM t"
    )
    assert t.engine_calls() == asked


def test_the_prompts_length_counts(t: FakeModel) -> None:
    budget(t.spark, maxLength=300)
    message = refused(t.spark, "SELECT llm('p', text) FROM t")
    assert "spark.llm.budget.maxLength = 300" in message
    assert "whose prompts have about" in message
    budget(t.spark, maxLength=3000)
    assert t.spark.sql("SELECT llm('p', text) FROM t").count() == 200


def test_partial_refuses_nothing(t: FakeModel) -> None:
    budget(t.spark, maxCalls=8, onExceeded="partial")
    rows = t.spark.sql("SELECT llm('p', id) AS a FROM t").collect()
    assert sum(row.a is not None for row in rows) == t.engine_calls() == 8
    report = spark_llm.last_report(t.spark)
    assert report is not None
    assert (report.calls, report.over_budget) == (8, 192)


def test_bounds_refuse_nothing(t: FakeModel) -> None:
    budget(t.spark, maxCalls=15)
    assert t.spark.sql("SELECT id FROM t WHERE llm('p', text) = 'none' LIMIT 0").collect() == []
    masked = t.spark.sql("SELECT if(k = 1, llm('p', text), 'none') FROM t")
    assert masked.count() == 200
    assert len(masked.collect()) == 200  # 5 texts


def test_a_budget_stands_though_nothing_can_be_estimated(t: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no estimate")

    # The package has the function under the module's name.
    monkeypatch.setattr(sys.modules["spark_llm.optimizer.rules.keep_budget"], "estimates", fail)
    budget(t.spark, maxCalls=7)
    [spec] = specs(t.spark.sql("SELECT llm('p', text) FROM t"))
    assert spec.budget == Budget(calls=7)


def test_explain_is_never_refused(t: FakeModel) -> None:
    query = "SELECT llm('p', text, k) FROM t"
    t.spark.sql(query).collect()
    budget(t.spark, maxCalls=1)
    jobs = spark_jobs(t.spark)
    [row] = t.spark.sql(f"EXPLAIN EXTENDED {query}").collect()
    assert "budget" in row.plan
    assert spark_jobs(t.spark) == jobs
    found = spark_llm.explain(t.spark.sql(query))
    assert [(note.rule, note.why) for note in found.notes] == [
        ("keepBudget", "each engine stops at 1 calls, the query fails then")
    ]


def test_the_estimate_needs_no_second_job(t: FakeModel) -> None:
    budget(t.spark, maxCalls=1000)
    before = planner(t.spark).statistics.jobs
    optimized(t.spark.sql("SELECT llm('p', id, upper(text), k) FROM t WHERE id < 191"))
    assert planner(t.spark).statistics.jobs == before + 1


def test_a_plan_without_a_budget_is_the_same_plan(t: FakeModel) -> None:
    df = t.spark.sql("SELECT llm('p', text) FROM t")
    plan = optimized(df)
    assert apply(t.spark, plan).fastEquals(plan)


def test_what_is_beyond_a_limit() -> None:
    assert is_beyond(exact(11, "job"), 10, 1.1)
    assert not is_beyond(exact(10, "job"), 10, 1.1)
    assert not is_beyond(about(11, "job"), 10, 1.1)
    assert is_beyond(about(11.5, "catalog"), 10, 1.1)
    assert not is_beyond(exact(11, "job"), 0, 1.1)
    assert not any(is_beyond(number, 10, 1.1) for number in (at_most(99, "job"), about(99, "guess"), UNKNOWN))
