"""OrderRows: the plan that it makes, when it keeps out, that it is idempotent and never changes a result."""

from __future__ import annotations

import itertools
import re
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from spark_llm.functions import registry
from spark_llm.optimizer.catalyst import runner
from spark_llm.optimizer.catalyst.bridge import Catalyst
from spark_llm.optimizer.rules.order_rows import order_rows

pytestmark = pytest.mark.spark

SPEC = re.compile(r'\{"fields".*?\}(?=, )|\{\}(?=, )')
SORT = re.compile(r"Sort \[(.*)\], false")


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    """The echo session with a table t(id, info, n) of which the optimizer knows nothing."""
    rows = echo.range(40, numPartitions=2).selectExpr("id", "string(id % 4) AS info", "CAST(id % 3 AS INT) AS n")
    echo.createDataFrame(rows.rdd, rows.schema).createOrReplaceTempView("t")
    return echo


def plan(df: DataFrame) -> str:
    """The optimized plan without the ids of columns, calls' specs and what differs between runs."""
    text = df._jdf.queryExecution().optimizedPlan().toString()
    text = SPEC.sub("spec", re.sub(r"#\d+L?", "", text))
    return re.sub(r"LogicalRDD \[.*", "LogicalRDD", text).strip()


def sorts(df: DataFrame) -> list[str]:
    """The keys of all local sorts of the plan, from the top down."""
    return SORT.findall(plan(df))


def golden(text: str) -> str:
    return textwrap.dedent(text).strip()


def test_columns_are_sorted_in_the_order_of_the_arguments(t: SparkSession) -> None:
    df = t.sql("SELECT id, llm(info, max_tokens => 2, text => info || 'x', other => info) AS a FROM t")
    assert sorts(t.sql("SELECT id, llm('p', b => info, a => string(info)) AS a FROM t")) == ["info ASC NULLS FIRST"]
    assert plan(df) == golden(
        """
        Project [id, pythonUDF0 AS a]
        +- Project [id, info, pythonUDF0]
           +- ArrowEvalPython [llm(spec, info, _llm1, info)], [pythonUDF0], 204
              +- Sort [info ASC NULLS FIRST, _llm1 ASC NULLS FIRST], false
                 +- Project [id, info, concat(info, x) AS _llm1]
                    +- Project [id, info]
                       +- LogicalRDD
        """
    )


def test_constants_are_no_keys_and_columns_need_no_project(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', info, kind => 'film') AS a FROM t")
    assert plan(df) == golden(
        """
        Project [pythonUDF0 AS a]
        +- ArrowEvalPython [llm(spec, p, info, film)], [pythonUDF0], 204
           +- Sort [info ASC NULLS FIRST], false
              +- Project [info]
                 +- LogicalRDD
        """
    )
    assert sorts(t.sql("SELECT llm('p', 'film') FROM t")) == []


def test_filter_and_projection_are_sorted_each(t: SparkSession) -> None:
    df = t.sql("SELECT id, llm('p', info) AS a FROM t WHERE llm('q', n) = 'yes'")
    assert plan(df) == golden(
        """
        Project [id, pythonUDF0 AS a]
        +- ArrowEvalPython [llm(spec, p, info)], [pythonUDF0], 204
           +- Sort [info ASC NULLS FIRST], false
              +- Project [id, info]
                 +- Filter (pythonUDF0 = yes)
                    +- Project [id, info, n, pythonUDF0]
                       +- ArrowEvalPython [llm(spec, q, _llm0)], [pythonUDF0], 204
                          +- Sort [_llm0 ASC NULLS FIRST], false
                             +- Project [id, info, n, cast(n as string) AS _llm0]
                                +- LogicalRDD
        """
    )


def test_two_questions_over_the_same_fields_are_sorted_once(t: SparkSession) -> None:
    for fields in ("info", "info, n"):
        df = t.sql(f"SELECT llm('p', {fields}) AS a, llm('q', {fields}) AS b FROM t")
        assert len(sorts(df)) == 1
        assert_idempotent(t, df)
    assert len(sorts(t.sql("SELECT llm('p', info, n) AS a, llm('q', n, info) AS b FROM t"))) == 2


def assert_idempotent(spark: SparkSession, df: DataFrame) -> None:
    optimized = df._jdf.queryExecution().optimizedPlan()
    assert order_rows(optimized, Catalyst.of(spark)).fastEquals(optimized)


APPLIES = {
    "a filter above": "SELECT a FROM (SELECT id, llm('p', info) AS a FROM t) WHERE a LIKE '%1%'",
    "ORDER BY ... LIMIT above": "SELECT id, llm('p', info) AS a FROM t ORDER BY a, id LIMIT 3",
    "GROUP BY ... LIMIT above": "SELECT llm('p', info) AS a, count(*) FROM t GROUP BY 1 LIMIT 10",
    "a window with ORDER BY above": "SELECT rank() OVER (ORDER BY a) FROM (SELECT llm('p', info) AS a FROM t)",
    "row numbers from below": "SELECT i, llm('p', info) FROM (SELECT monotonically_increasing_id() AS i, info FROM t)",
    "a join above": "SELECT * FROM (SELECT id, llm('p', info) AS a FROM t) JOIN range(9) r USING (id)",
    "a join below": "SELECT llm('p', info, r.id) FROM t JOIN (SELECT * FROM range(9) ORDER BY id DESC) r USING (id)",
    "an aggregate below": "SELECT llm('p', info, m) FROM (SELECT info, max(n) AS m FROM t GROUP BY info)",
    "a union": "SELECT llm('p', info) FROM t UNION ALL SELECT info FROM t",
    "a repartition below": "SELECT llm('p', info) FROM (SELECT /*+ REPARTITION(3) */ * FROM t)",
    "sampling with a seed": "SELECT llm('p', info, temperature => 0.5, seed => 1) FROM t",
    "a scalar subquery": "SELECT id, (SELECT max(llm('p', info)) FROM t) FROM range(2)",
    "a sum of its lengths": "SELECT sum(length(llm('p', info))) FROM t",
}


@pytest.mark.parametrize("query", APPLIES.values(), ids=list(APPLIES))
def test_applies(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    assert any(keys.startswith("info ASC") for keys in sorts(df))
    assert_idempotent(t, df)


KEEPS_OUT = {
    "LIMIT above": "SELECT id, llm('p', info) FROM t LIMIT 3",
    "OFFSET above": "SELECT id, llm('p', info) FROM t OFFSET 3",
    "LIMIT over a filter above": "SELECT * FROM (SELECT id, llm('p', info) AS a FROM t) WHERE a LIKE '%1%' LIMIT 3",
    "LIMIT over a join above": "SELECT * FROM (SELECT id, llm('p', info) FROM t) JOIN range(9) r USING (id) LIMIT 3",
    "ORDER BY below": "SELECT id, llm('p', info) FROM (SELECT * FROM t ORDER BY id)",
    "SORT BY below": "SELECT id, llm('p', info) FROM (SELECT * FROM t SORT BY id DESC)",
    "ORDER BY ... LIMIT below": "SELECT id, llm('p', info) FROM (SELECT * FROM t ORDER BY id LIMIT 9)",
    "ORDER BY under a filter": "SELECT llm('p', info) FROM (SELECT * FROM t ORDER BY id) WHERE n = 1",
    "row numbers above": "SELECT monotonically_increasing_id(), llm('p', info) FROM t",
    "rand above": "SELECT rand(1), llm('p', info) FROM t",
    "partition ids above": "SELECT spark_partition_id(), a FROM (SELECT llm('p', info) AS a FROM t)",
    "first()": "SELECT first(llm('p', info)) FROM t",
    "collect_list()": "SELECT n, collect_list(llm('p', info)) FROM t GROUP BY n",
    "a window without ORDER BY": "SELECT first_value(a) OVER (PARTITION BY n) FROM (SELECT n, llm('p', info) a FROM t)",
    "a sample above": "SELECT * FROM (SELECT llm('p', info) FROM t) TABLESAMPLE (10 PERCENT) REPEATABLE (1)",
    "a random argument": "SELECT llm('p', info, r => rand()) FROM t",
    "sampling without a seed": "SELECT llm('p', info, temperature => 0.5) FROM t",
}


@pytest.mark.parametrize("query", KEEPS_OUT.values(), ids=list(KEEPS_OUT))
def test_keeps_out(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    assert "ArrowEvalPython" in plan(df)
    assert not any("info ASC" in keys for keys in sorts(df))


def test_keeps_out_where_user_code_sees_the_order(t: SparkSession) -> None:
    answers = t.sql("SELECT id, llm('p', info) AS a FROM t")
    assert sorts(answers.mapInPandas(lambda batches: batches, "id LONG, a STRING")) == []
    assert sorts(answers.dropDuplicates(["a"])) == []  # keeps the first id of each
    assert sorts(answers.select("a").distinct()) == ["info ASC NULLS FIRST"]


def test_keeps_out_over_a_sorted_cache(t: SparkSession) -> None:
    ordered = t.table("t").orderBy("id").cache()
    try:
        ordered.createOrReplaceTempView("ordered")
        assert sorts(t.sql("SELECT id, llm('p', info) FROM ordered")) == []
    finally:
        ordered.unpersist()


def test_keeps_out_of_streams(t: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a micro-batch is optimized on a thread of the JVM, which calls Python from there."""
    t.table("t").coalesce(1).write.json(str(tmp_path / "in"))
    asked: list[threading.Thread] = []

    def run_rules(plan: Any, *rest: Any) -> Any:
        asked.append(threading.current_thread())
        return runner.run_rules(plan, *rest)

    monkeypatch.setattr(registry, "run_rules", run_rules)
    stream = t.readStream.schema("info STRING").json(str(tmp_path / "in")).selectExpr("llm('p', info) AS a")
    query = stream.writeStream.format("memory").queryName("answers").trigger(availableNow=True).start()
    try:
        query.processAllAvailable()
        assert t.table("answers").count() == 40
        assert "Sort" not in query._jsq.explainInternal(False)
        assert threading.main_thread() not in asked[-1:]
        assert asked
    finally:
        query.stop()


def test_settings_switch_it_off(t: SparkSession) -> None:
    query = "SELECT llm('p', info) FROM t"
    for key in ("spark.llm.optimizer.enabled", "spark.llm.optimizer.orderRows.enabled"):
        t.sql(f"SET {key} = false")
        assert sorts(t.sql(query)) == []
        t.sql(f"RESET {key}")
        assert sorts(t.sql(query)) == ["info ASC NULLS FIRST"]


def test_results_are_the_same_bag(t: SparkSession) -> None:
    shapes = ("a filter above", "a window with ORDER BY above", "a join below")
    for query in map(APPLIES.__getitem__, shapes):
        t.conf.set("spark.llm.optimizer.enabled", "true")
        ordered = t.sql(query).collect()
        t.conf.set("spark.llm.optimizer.enabled", "false")
        assert Counter(map(str, ordered)) == Counter(map(str, t.sql(query).collect())), query


def test_equal_arguments_are_neighbours_within_a_task(t: SparkSession) -> None:
    rows = t.sql("SELECT spark_partition_id() AS p, a FROM (SELECT llm('p', info, n) AS a FROM t)")
    assert sorts(rows) == []  # the plan shows positions
    answers = [row.a for row in t.sql("SELECT llm('p', info, n) AS a FROM t").collect()]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(answers))
    assert len(set(answers)) == 12
    assert runs <= 24  # two tasks, each with its run of every distinct prompt
