"""Rules cost queries without a call nothing, and can cost a query with one time, but never its result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from plans import specs
from pyspark.sql import SparkSession

from spark_llm.functions import registry
from spark_llm.optimizer.catalyst import bridge
from spark_llm.optimizer.catalyst.bridge import Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.runner import Rule
from spark_llm.optimizer.rules import RULES

pytestmark = pytest.mark.spark

QUERY = "SELECT id, llm('p', text) AS a FROM t WHERE id > 1"


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    echo.range(4, numPartitions=1).selectExpr("id", "string(id) AS text").createOrReplaceTempView("t")
    return echo


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that the JVM calls Python."""
    calls: list[Any] = []
    apply = bridge.Operator.apply

    def counting(self: bridge.Operator, pair: Any) -> Any:
        calls.append(pair)
        return apply(self, pair)

    monkeypatch.setattr(bridge.Operator, "apply", counting)
    return calls


def test_queries_without_a_call_never_ask_python(t: SparkSession, asked: list[Any]) -> None:
    t.udf.register("twice", lambda x: x * 2, "long")
    t.sql("SELECT id % 2 AS k, count(*) FROM t JOIN range(3) r USING (id) GROUP BY 1 ORDER BY 1").collect()
    t.sql("SELECT twice(id), upper(text) FROM t").collect()
    assert asked == []
    t.sql(QUERY).collect()
    assert asked != []


def use(monkeypatch: pytest.MonkeyPatch, apply: Callable[[Node, Context], Node]) -> None:
    monkeypatch.setattr(registry, "RULES", (Rule("reorderRows", apply),))


def test_a_rule_that_throws_leaves_the_plan(
    t: SparkSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(plan: Node, context: Context) -> Node:
        raise ValueError("a bug in a rule")

    use(monkeypatch, fails)
    with caplog.at_level(logging.WARNING, "spark_llm.optimizer"):
        assert len(t.sql(QUERY).collect()) == 2
    [record] = caplog.records
    assert "Rule reorderRows failed" in record.message
    assert record.exc_info is not None
    assert "a bug in a rule" in str(record.exc_info[1])


def below(plan: Node) -> Node:
    return plan.children().apply(0)


WRONG = {
    "other columns": lambda plan, context: below(plan),
    "a column from nowhere": lambda plan, context: context.catalyst.with_children(
        plan, [context.catalyst.plans.OneRowRelation()]
    ),
    "not a plan": lambda plan, context: None,
    "an expression": lambda plan, context: items(plan.output())[0],
}


@pytest.mark.parametrize("apply", WRONG.values(), ids=list(WRONG))
def test_a_wrong_plan_is_not_taken(
    t: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    apply: Callable[[Node, Context], Node],
) -> None:
    use(monkeypatch, apply)
    with caplog.at_level(logging.WARNING, "spark_llm.optimizer"):
        rows = t.sql(QUERY).collect()
    assert [row.id for row in rows] == [2, 3]
    assert "the plan stays as it was" in caplog.text


def test_a_setting_that_goes_wrong_after_the_analysis_skips_the_rules(
    t: SparkSession, caplog: pytest.LogCaptureFixture
) -> None:
    df = t.sql(QUERY)
    t.conf.set("spark.llm.optimizer.enabled", "perhaps")
    with caplog.at_level(logging.WARNING, "spark_llm.optimizer"):
        assert "Sort" not in df._jdf.queryExecution().optimizedPlan().toString()
    assert "LLM_INVALID_CONFIG" in caplog.text


def test_the_other_rules_run_where_one_throws(t: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(plan: Node, context: Context) -> Node:
        raise ValueError("a bug in a rule")

    others = tuple(rule for rule in RULES if rule.name != "reorderColumns")
    monkeypatch.setattr(registry, "RULES", (Rule("reorderColumns", fails), *others))
    [spec] = specs(t.sql("SELECT llm('p', text, id) FROM t"))
    assert spec.prompt is not None
    assert spec.prompt.fields_why == ""
    assert spec.prompt.instruction_why
    assert spec.rows is not None
    assert spec.rows.fold
    assert spec.rows.order_why


def test_a_statistics_job_that_fails_costs_the_order_only(
    t: SparkSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    t.range(30).selectExpr("id", "1 / (id - 20) AS broken").createOrReplaceTempView("u")
    with caplog.at_level(logging.WARNING, "spark_llm.optimizer"):
        df = t.sql("SELECT llm('p', id, broken) FROM u")
        [spec] = specs(df)
    assert "The statistics job for 'p' failed" in caplog.text
    assert spec.prompt is not None
    assert "the statistics job failed" in spec.prompt.fields_why


def test_a_session_of_another_thread_is_the_rules_session(t: SparkSession) -> None:
    """The rules of a query read the settings of its session, whichever thread plans it."""
    other = t.newSession()
    other.conf.set("spark.llm.optimizer.reorderRows.partitions", "5")

    def partitions(session: SparkSession) -> int:
        df = session.sql("SELECT llm('p', id % 9) FROM range(0, 99, 1, 3)")
        [spec] = specs(df)
        assert spec.rows is not None
        return spec.rows.partitions

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(partitions, [t, other, t, other])) == [2, 5, 2, 5]
