"""HoldTaskSlots: a query's calls take a part of the slots, and nothing of its result changes."""

from __future__ import annotations

from typing import Any

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent, golden, settings, text
from pyspark.sql import DataFrame, SparkSession

import spark_llm
from spark_llm.functions.task_slots import call_tasks

pytestmark = pytest.mark.spark


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    """t(id, k, text): 400 rows in 6 partitions; one task of the two slots is for calls."""
    echo.conf.set("spark.llm.tasksPerEngine", "1")
    table = echo.range(0, 400, 1, 6).selectExpr("id", "id % 10 AS k", "concat('text ', id % 50) AS text")
    table.createOrReplaceTempView("t")
    return echo


def held(df: DataFrame) -> list[int]:
    """The partitions of the rule's nodes, from the top down."""
    lines = [line.split("Repartition ")[1] for line in text(df).splitlines() if "Repartition " in line]
    return [int(line.split(",")[0]) for line in lines if line.endswith("false")]


def test_sorted_partitions_are_taken_one_after_the_other(t: SparkSession) -> None:
    settings(t, statistics_enabled=False)
    df = t.sql("SELECT id, llm('p', text) AS a FROM t")
    assert text(df) == golden(
        """
        Project [id, pythonUDF0 AS a]
        +- Project [id, pythonUDF0]
           +- ArrowEvalPython [llm(spec, p, _llm0)], [pythonUDF0], 204
              +- Repartition 1, false
                 +- Sort [_llm0 ASC NULLS FIRST], false
                    +- RepartitionByExpression [_llm0], 6
                       +- Project [id, concat(text , cast((id % 50) as string)) AS _llm0]
                          +- Range (0, 400, step=1, splits=Some(6))
        """
    )
    assert df.rdd.getNumPartitions() == 1
    assert_idempotent(df)


APPLIES = {
    "partitions without an exchange": ("SELECT llm('p', id) FROM t", [1]),
    "two calls in two stages": ("SELECT llm('p', text) AS a, llm('q', k) AS b FROM t", [1, 1]),
    "a filter and a projection": ("SELECT llm('p', text) FROM t WHERE llm('q', text) LIKE '%1%'", [1]),
    "below ORDER BY": ("SELECT id, llm('p', text) AS a FROM t ORDER BY id", [1]),
    "below ORDER BY ... LIMIT": ("SELECT id, llm('p', text) AS a FROM t ORDER BY a LIMIT 3", [1]),
    "below GROUP BY": ("SELECT llm('p', text) AS a, count(DISTINCT id) FROM t GROUP BY 1", [1]),
    "both sides of a join": (
        "SELECT * FROM (SELECT k, llm('p', text) AS a FROM t) JOIN (SELECT k, llm('q', text) AS b FROM t) USING (k)",
        [1, 1],
    ),
    "a subquery": ("SELECT id FROM t WHERE string(id) IN (SELECT llm('p', text) FROM t)", [1]),
}


@pytest.mark.parametrize(("query", "expected"), APPLIES.values(), ids=list(APPLIES))
def test_where_it_applies(t: SparkSession, query: str, expected: list[int]) -> None:
    settings(t, reuseAnswers_enabled=False, aggregateDistinct_enabled=False, fuseCalls_enabled=False)
    df = t.sql(query)
    assert held(df) == expected
    assert_idempotent(df)


KEEPS_OUT = {
    "a LIMIT above": "SELECT llm('p', text) FROM t LIMIT 20",
    "a LIMIT above a filter": "SELECT id FROM t WHERE llm('p', text) LIKE '%1%' LIMIT 20",
    "ORDER BY below": "SELECT llm('p', text) FROM (SELECT * FROM t ORDER BY id)",
    "SORT BY below": "SELECT id, llm('p', text) FROM (SELECT * FROM t SORT BY id DESC)",
    "repartition(3) below": "SELECT llm('p', text) FROM (SELECT /*+ REPARTITION(3) */ * FROM t)",
    "DISTRIBUTE BY below": "SELECT llm('p', text) FROM (SELECT * FROM t DISTRIBUTE BY k)",
    "row numbers above": "SELECT monotonically_increasing_id(), a FROM (SELECT llm('p', text) AS a FROM t)",
    "first() above": "SELECT first(a) FROM (SELECT llm('p', text) AS a FROM t)",
    "one partition": "SELECT llm('p', id) FROM range(0, 50, 1, 1)",
}


@pytest.mark.parametrize("query", KEEPS_OUT.values(), ids=list(KEEPS_OUT))
def test_where_it_keeps_out(t: SparkSession, query: str) -> None:
    assert held(t.sql(query)) == []


def test_branches_that_may_run_at_a_time_share_what_there_is(t: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_llm.functions.planning.call_tasks", lambda *given: 5)
    settings(t, statistics_enabled=False, reuseAnswers_enabled=False)
    union = "SELECT llm('p', text) FROM t UNION ALL SELECT llm('q', id) FROM range(0, 400, 1, 9)"
    assert held(t.sql(union)) == [2, 2]
    assert held(t.sql("SELECT llm('p', text) FROM t")) == [5]


def test_it_is_said_in_explain_and_can_be_switched_off(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', text) FROM t")
    explained = spark_llm.explain(df)
    assert ("holdTaskSlots", True) in [(note.rule, note.fired) for note in explained.calls[0].notes]
    assert "at most 1 task at a time" in str(explained)
    kept = spark_llm.explain(t.sql("SELECT llm('p', text) FROM (SELECT /*+ REPARTITION(3) */ * FROM t)"))
    [note] = [note for note in kept.calls[0].notes if note.rule == "holdTaskSlots"]
    assert (note.fired, note.why) == (False, "may take all task slots: the query asks for its partitions")
    settings(t, holdTaskSlots_enabled=False)
    assert held(t.sql("SELECT llm('p', text) FROM t")) == []


def test_answers_and_calls_are_those_without_it(model: FakeModel) -> None:
    spark = model.spark
    spark.range(0, 300, 1, 6).selectExpr("id", "concat('text ', id % 50) AS text").createOrReplaceTempView("t")
    query = "SELECT id, llm('p', text) AS a, llm('q', text) AS b FROM t"
    free = sorted(spark.sql(query).collect())
    calls = sorted(request.prompt for request in model.requests())
    spark.conf.set("spark.llm.tasksPerEngine", "1")
    df = spark.sql(query)
    assert held(df) == [1]
    assert sorted(df.collect()) == free
    assert sorted(request.prompt for request in model.requests()) == sorted(2 * calls)


class FakeSpark:
    """What ``call_tasks`` asks a SparkContext of the JVM."""

    def __init__(self, master: str, running: int, **settings: str) -> None:
        self.master = master
        self.running = running
        self.settings = {"spark.master": master} | {f"spark.{k.replace('_', '.')}": v for k, v in settings.items()}

    def isLocal(self) -> bool:
        return self.master.startswith("local[")

    def maxNumConcurrentTasks(self, profile: Any) -> int:
        return self.running

    def resourceProfileManager(self) -> Any:
        return self

    def defaultResourceProfile(self) -> None:
        return None

    def conf(self) -> Any:
        return self

    def contains(self, key: str) -> bool:
        return key in self.settings

    def get(self, key: str, default: str = "") -> str:
        return self.settings.get(key, default)


DYNAMIC = {"dynamicAllocation_enabled": "true", "executor_cores": "8", "task_cpus": "2"}
SLOTS = {
    "half of a local Spark": (FakeSpark("local[4]", 4), 1, 0, 2),
    "an odd number": (FakeSpark("local[5]", 5), 1, 0, 2),
    "one slot cannot be shared": (FakeSpark("local[1]", 1), 1, 0, 0),
    "what was asked for": (FakeSpark("local[4]", 4), 1, 3, 3),
    "all slots": (FakeSpark("local[4]", 4), 1, 4, 0),
    "executors that run": (FakeSpark("spark://host", 24), 3, 0, 12),
    "executors that are still to come": (FakeSpark("spark://host", 8, executor_instances="5"), 1, 0, 20),
    "none yet": (FakeSpark("yarn", 0, executor_instances="5", executor_cores="6"), 1, 0, 15),
    "dynamic allocation within bounds": (FakeSpark("yarn", 4, dynamicAllocation_maxExecutors="9", **DYNAMIC), 1, 0, 18),
    "dynamic allocation without": (FakeSpark("yarn", 4, **DYNAMIC), 1, 0, 0),
}


@pytest.mark.parametrize(("spark", "engines", "asked", "expected"), SLOTS.values(), ids=list(SLOTS))
def test_how_many_tasks(spark: FakeSpark, engines: int, asked: int, expected: int) -> None:
    assert call_tasks(spark, engines, asked) == expected


def test_the_real_spark_is_asked(spark: SparkSession) -> None:
    context = spark.sparkContext._jsc.sc()
    assert call_tasks(context, 1, 0) == 1
    assert call_tasks(context, 1, 2) == 0
