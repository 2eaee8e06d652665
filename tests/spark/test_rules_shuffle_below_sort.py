"""ShuffleBelowSort: calls below a global ORDER BY run once per row."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import pandas_udf

import spark_llm
from spark_llm.functions.registry import Registry

pytestmark = pytest.mark.spark

RANGES = re.compile(r"Sort \[.*\], true|RepartitionByExpression \[[^\]]* ASC")
RULE = "spark.llm.optimizer.shuffleBelowSort.enabled"


@pytest.fixture
def counted(spark: SparkSession) -> Iterator[tuple[SparkSession, Any]]:
    """A session whose llm() answers with the row's field, and the number of rows that it was given."""
    rows = spark.sparkContext.accumulator(0)

    def fake_count(batches: Iterator[tuple[pd.Series[str], ...]]) -> Iterator[pd.Series[str]]:
        for columns in batches:
            rows.add(len(columns[0]))
            yield columns[2]

    fake_count.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
    udf = pandas_udf(fake_count, "string")
    with Registry.of(spark).using(spark, lambda tables, calls=0: udf):
        session = spark_llm.enable(spark.newSession())
        session.range(0, 40, 1, 4).selectExpr("id", "string(id % 7) AS text").createOrReplaceTempView("t")
        yield session, rows


def exchanges(df: DataFrame) -> int:
    """Exchanges between a global sort and what stands below it."""
    lines = df._jdf.queryExecution().optimizedPlan().toString().splitlines()
    pairs = itertools.pairwise(lines)
    return sum(bool(RANGES.search(one)) and "RepartitionByExpression" in other for one, other in pairs)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT id, llm('p', text) AS a FROM t ORDER BY id",
        "SELECT id, llm('p', text) AS a FROM t ORDER BY a, id",
        "SELECT id FROM t WHERE llm('p', text) <> '3' ORDER BY id DESC",
        "SELECT id FROM t ORDER BY length(llm('p', text)) DESC, id, upper(text) NULLS LAST",
        "SELECT t.id, llm('p', text) AS a FROM t JOIN range(40) r USING (id) ORDER BY id",
        "SELECT /*+ REPARTITION_BY_RANGE(3, id) */ id, llm('p', text) AS a FROM t",
    ],
)
def test_each_row_is_asked_once(counted: tuple[SparkSession, Any], query: str) -> None:
    session, rows = counted
    ordered = session.sql(query)
    assert exchanges(ordered) == 1
    found = sorted(ordered.collect())
    assert rows.value == 40
    session.conf.set(RULE, "false")
    assert sorted(session.sql(query).collect()) == found
    assert rows.value == 40 + 80, "without the rule Spark runs what stands below twice: is the rule still needed?"


@pytest.mark.parametrize(
    "query",
    [
        "SELECT id, llm('p', text) AS a FROM t ORDER BY id LIMIT 3",
        "SELECT llm('p', text) AS a, count(*) FROM t GROUP BY 1 ORDER BY 1",
        "SELECT id, rank() OVER (ORDER BY a) AS r FROM (SELECT id, llm('p', text) AS a FROM t) ORDER BY r, id",
        "SELECT id, llm('p', text) AS a FROM t SORT BY id",
        "SELECT id, llm('p', text) AS a FROM t",
        "SELECT id FROM t ORDER BY id",
    ],
)
def test_keeps_out(counted: tuple[SparkSession, Any], query: str) -> None:
    assert exchanges(counted[0].sql(query)) == 0


def test_what_is_computed_to_sort_by_is_computed_below(counted: tuple[SparkSession, Any]) -> None:
    """The exchange carries the key, not the answer of which it is made; rows come in the same order."""
    session, _ = counted
    query = "SELECT id FROM t ORDER BY length(llm('p', text)) DESC, id % 3, text, id"
    ordered = session.sql(query)
    plan = ordered._jdf.queryExecution().optimizedPlan().toString()
    assert len([line for line in plan.splitlines() if "RepartitionByExpression [_llm_key0" in line]) == 1
    [computed] = [line for line in plan.splitlines() if "AS _llm_key0" in line]
    assert computed.count("pythonUDF0") == computed.count("length(pythonUDF0") == 1  # it is in the key only
    found = ordered.collect()
    session.conf.set(RULE, "false")
    assert session.sql(query).collect() == found
