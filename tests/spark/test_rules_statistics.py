"""What the rules know of a call's input: by ANALYZE TABLE, by one Spark job or by the plan; and what EXPLAIN does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from fake_counting import FakeModel
from plans import context, optimized, orders, planner, prompts, settings, spark_jobs
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import pandas_udf, udf

from spark_llm.optimizer.rules.calls import all_calls
from spark_llm.optimizer.statistics import InputStatistics

pytestmark = pytest.mark.spark

JOB = "by 200 rows"


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    """t(id, k, text): 200 rows of the JVM, which a job may read."""
    echo.range(0, 200, 1, 2).selectExpr(
        "id", "id % 4 AS k", "concat('a longer text ', id % 20) AS text"
    ).createOrReplaceTempView("t")
    return echo


@pytest.fixture
def analysed(t: SparkSession) -> Iterator[SparkSession]:
    """As t, with a table ``analysed`` of the same rows whose statistics are in the catalog."""
    t.sql("DROP TABLE IF EXISTS analysed")
    t.sql("CREATE TABLE analysed USING parquet AS SELECT * FROM t")
    t.sql("ANALYZE TABLE analysed COMPUTE STATISTICS FOR ALL COLUMNS")
    yield t
    t.sql("DROP TABLE analysed")


def why(df: DataFrame) -> str:
    return prompts(df)[0].fields_why


def known(spark: SparkSession, query: str) -> InputStatistics:
    """What the rules know of the input of the query's call."""
    settings(spark, reorderRows_enabled=False)  # which puts nodes of its own below the call
    here = context(spark)
    [call] = all_calls(optimized(spark.sql(query)), here.catalyst)
    return here.statistics.of(call, here)


# The job


def test_a_job_counts_once_for_an_input(t: SparkSession) -> None:
    before = planner(t).statistics.jobs
    first = t.sql("SELECT llm('p', id, text, k) FROM t WHERE id < 150")
    assert orders(first) == [["k", "text", "id"]]
    assert "by 150 rows" in why(first)
    assert planner(t).statistics.jobs == before + 1
    jobs = spark_jobs(t)
    for query in (
        "SELECT llm('p', id, text, k) FROM t WHERE id < 150",
        "SELECT llm('another prompt', id, text, k, max_tokens => 3) AS a FROM t WHERE id < 150",
        "SELECT id FROM t WHERE id < 150 AND llm('p', id, text, k) = 'x'",
    ):
        assert why(t.sql(query)) == why(first)
    assert planner(t).statistics.jobs == before + 1
    assert spark_jobs(t) == jobs
    assert why(t.sql("SELECT llm('p', id, text, k) FROM t WHERE id < 151")) != why(first)
    assert planner(t).statistics.jobs == before + 2


def test_a_job_s_numbers(t: SparkSession) -> None:
    found = known(t, "SELECT llm('p', id, text, k) FROM t WHERE id < 140")
    assert found.rows == 140
    assert [column.distinct for column in found.columns] == [140, 20, 4]
    assert found.hashes is not None
    assert found.lengths is not None
    assert found.hashes.shape == found.lengths.shape == (140, 3)
    assert found.partitions == 2
    lengths = [column.length for column in found.columns]
    assert all(length is not None and 2 < length < 20 for length in lengths)
    assert max(lengths) == lengths[1]  # type: ignore[type-var]


def test_a_job_samples_a_large_input(t: SparkSession) -> None:
    found = known(t, "SELECT llm('p', a => id % 30, b => id) FROM range(0, 60000, 1, 2)")
    assert found.rows == 60_000
    assert found.source.startswith("a sample of ")
    assert found.hashes is not None
    assert 19_000 < len(found.hashes) < 21_000
    assert found.columns[0].distinct == 30
    assert 57_000 <= (found.columns[1].distinct or 0) <= 60_000


def test_a_filter_by_a_call_is_left_out_of_the_job(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', id, text) FROM (SELECT * FROM t WHERE k < 2) WHERE llm('q', k) = 'x'")
    assert "by 100 rows" in prompts(df)[1].fields_why


# What is cheap enough for a job

CHEAP = {
    "files": "SELECT llm('p', id, text) FROM parquet.`{path}`",
    "a join": "SELECT llm('p', id, text) FROM t JOIN (SELECT id % 4 AS k FROM range(4)) USING (k)",
    "an aggregate": "SELECT llm('p', id, m) FROM (SELECT id, max(text) AS m FROM t GROUP BY id)",
    "a union": "SELECT llm('p', id, text) FROM (SELECT id, text FROM t WHERE k < 2 UNION SELECT id, text FROM t)",
    "a window": "SELECT llm('p', id, r) FROM (SELECT id, rank() OVER (PARTITION BY text ORDER BY id) AS r FROM t)",
    "explode": "SELECT llm('p', v, text) FROM t LATERAL VIEW explode(array(id)) e AS v",
    "local rows": "SELECT llm('p', id, text) FROM (SELECT id, text FROM t CROSS JOIN (VALUES (1)) v(one))",
}


@pytest.mark.parametrize("query", CHEAP.values(), ids=list(CHEAP))
def test_a_job_runs_over_what_is_cheap(t: SparkSession, query: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("statistics") / "t"
    if "{path}" in query:
        t.table("t").write.parquet(str(path))
    assert JOB in why(t.sql(query.format(path=path)))


def test_a_cached_table_is_cheap(t: SparkSession) -> None:
    cached = t.table("t").withColumn("more", udf(lambda x: x + "!")("text")).cache()
    try:
        cached.count()
        cached.createOrReplaceTempView("cached")
        assert JOB in why(t.sql("SELECT llm('p', id, more) FROM cached"))
    finally:
        cached.unpersist()


def dear(t: SparkSession, name: str) -> DataFrame:
    table = t.table("t")
    if name == "a Python UDF":
        table = table.withColumn("text", udf(lambda x: x + "!")("text"))
    elif name == "a pandas UDF":

        def loud(texts: pd.Series) -> pd.Series:
            return texts + "!"

        loud.__annotations__ = {"texts": pd.Series, "return": pd.Series}
        table = table.withColumn("text", pandas_udf(loud, "string")("text"))
    elif name == "mapInPandas":
        table = table.mapInPandas(lambda batches: batches, table.schema)
    elif name == "an RDD of Python":
        table = t.createDataFrame(table.rdd.map(lambda row: row), table.schema)
    elif name == "a cross join":
        large = t.range(20_000).selectExpr("id", "id % 2 AS k", "string(id) AS text")
        table = large.crossJoin(t.range(20_000).withColumnRenamed("id", "other"))
    elif name == "another call":
        table = table.selectExpr("id", "k", "llm('inner', k) AS text")
    return table


DEAR = {
    "a Python UDF": "a field comes from a Python function or another call",
    "a pandas UDF": "a field comes from a Python function or another call",
    "mapInPandas": "there is a UDF below the call",
    "an RDD of Python": "an RDD with Python code below the call may be dear to run twice",
    "a cross join": "a join without an equality below the call may be dear to run twice",
    "another call": "nothing is known: a field comes from a Python function or another call",
}


@pytest.mark.parametrize(("name", "reason"), DEAR.items(), ids=list(DEAR))
def test_no_job_runs_over_what_is_dear(t: SparkSession, name: str, reason: str) -> None:
    df = dear(t, name).selectExpr("llm('p', id, text)")
    jobs = planner(t).statistics.jobs
    decision = prompts(df)[-1].fields_why
    assert "by rule of thumb" in decision
    assert reason in decision
    if name != "another call":
        assert planner(t).statistics.jobs == jobs


def test_no_job_runs_over_large_tables(t: SparkSession) -> None:
    settings(t, statistics_maxSize="1k")
    assert "the tables below the call have" in why(t.sql("SELECT llm('p', text, k) FROM t WHERE id < 199"))


def test_a_setting_forbids_jobs(t: SparkSession) -> None:
    query = "SELECT llm('p', text, id) FROM t"
    assert JOB in why(t.sql(query))
    settings(t, statistics_enabled=False)
    jobs = spark_jobs(t)
    assert "the plan alone (spark.llm.optimizer.statistics.enabled is false)" in why(t.sql(query))
    assert spark_jobs(t) == jobs


# The catalog


def test_analysed_tables_need_no_job(analysed: SparkSession) -> None:
    jobs = spark_jobs(analysed)
    query = "SELECT llm('p', id, text, k) FROM analysed"
    df = analysed.sql(query)
    assert orders(df) == [["text", "k", "id"]]
    assert why(df).endswith("by the catalog")
    assert spark_jobs(analysed) == jobs
    found = known(analysed, query)
    assert (found.rows, found.source) == (200, "the catalog")
    assert [column.distinct for column in found.columns] == pytest.approx([200, 20, 4], rel=0.1)


def test_statistics_of_the_catalog_serve_explain(analysed: SparkSession) -> None:
    assert orders(analysed.sql("SELECT llm('p', id, text, k) FROM analysed")) == [["text", "k", "id"]]
    shown = analysed.sql("EXPLAIN SELECT llm('p', id, text, k) FROM analysed").first()
    assert shown is not None
    assert "by the catalog" in shown[0]


def test_they_follow_names_through_projections(analysed: SparkSession) -> None:
    df = analysed.sql("SELECT llm('p', n, loud) FROM (SELECT id AS n, upper(text) AS loud FROM analysed)")
    assert orders(df) == [["loud", "n"]]
    assert why(df).endswith("by the catalog")


def test_a_table_without_column_statistics_is_counted_by_a_job(analysed: SparkSession) -> None:
    analysed.sql("DROP TABLE IF EXISTS plain_table")
    analysed.sql("CREATE TABLE plain_table USING parquet AS SELECT * FROM t")
    try:
        assert JOB in why(analysed.sql("SELECT llm('p', id, text) FROM plain_table"))
    finally:
        analysed.sql("DROP TABLE plain_table")


# EXPLAIN


def shows(df: DataFrame) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        df.explain()
    return out.getvalue()


def test_explain_runs_no_job_and_shows_decisions_with_reasons(t: SparkSession) -> None:
    query = "SELECT id, llm('p', id, text, k) FROM t WHERE id < 120"
    jobs = spark_jobs(t)
    by_sql = t.sql("EXPLAIN " + query).first()
    by_extended = t.sql("EXPLAIN EXTENDED " + query).first()
    by_formatted = t.sql("EXPLAIN FORMATTED " + query).first()
    assert by_sql is not None
    assert by_extended is not None
    assert by_formatted is not None
    found = [by_sql[0], by_extended[0], by_formatted[0], shows(t.sql(query))]
    assert spark_jobs(t) == jobs
    for shown in found:
        assert "the plan alone (no job runs for EXPLAIN)" in shown
        assert "first: all rows share it" in shown
        assert '"fold":true' in shown
        assert "sorted in 2 partitions by" in shown


def test_explain_shows_what_was_counted_for_the_query_before(t: SparkSession) -> None:
    query = "SELECT id, llm('p', id, text, k) FROM t WHERE id < 121"
    assert "by 121 rows" in why(t.sql(query))
    jobs = spark_jobs(t)
    shown = t.sql("EXPLAIN " + query).first()
    assert shown is not None
    assert "k, text, id: " in shown[0]
    assert "by 121 rows" in shown[0]
    assert spark_jobs(t) == jobs


def test_planning_fills_no_cache_and_asks_no_model(model: FakeModel) -> None:
    spark = model.spark
    spark.range(0, 40, 1, 2).selectExpr("id", "concat('text ', id % 7) AS text").createOrReplaceTempView("t")
    cached = spark.sql("SELECT id, text, llm('p', id, text) AS answer FROM t").cache()
    try:
        model.forget()
        asked = cached.selectExpr("llm('q', answer, text) AS a")
        assert "not filled yet" in why(asked)
        assert model.requests() == []
        cached.count()
        model.forget()
        assert "by 40 rows" in why(cached.selectExpr("llm('r', answer, text) AS a"))
        assert model.requests() == []
    finally:
        cached.unpersist()


def test_a_table_that_has_grown_is_counted_again(t: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "grows")
    t.range(0, 20, 1, 1).selectExpr("id", "'the same' AS text").write.parquet(path)
    assert "by 20 rows" in why(t.read.parquet(path).selectExpr("llm('p', id, text)"))
    t.range(20, 500, 1, 1).selectExpr("id", "'the same' AS text").write.mode("append").parquet(path)
    assert "by 500 rows" in why(t.read.parquet(path).selectExpr("llm('p', id, text)"))


def test_the_catalog_does_not_know_what_a_filter_leaves(analysed: SparkSession) -> None:
    assert "by the catalog" in why(analysed.sql("SELECT llm('p', id, text) FROM analysed"))
    assert "by 20 rows" in why(analysed.sql("SELECT llm('p', id, text) FROM analysed WHERE id < 20"))
