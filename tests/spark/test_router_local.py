"""Two engines of one executor, by spark.llm.engine.perExecutor: with and without a router they answer as one does."""

from __future__ import annotations

import pytest
from pyspark.sql import SparkSession

import spark_llm
from spark_llm.engine.service.client import list_engines
from spark_llm.report import install

pytestmark = pytest.mark.spark

# Drawn: the likeliest answers of a random model are all the same.
DRAWN = "temperature => 1.0, seed => 7, max_tokens => 2"
ASK = f"llm('Say it.', concat('group ', id div 8, repeat(' x', 20)), concat('row ', id), {DRAWN})"
ROWS = 32


@pytest.fixture
def session(spark: SparkSession, random_model: str) -> SparkSession:
    options = {"engine_dtype": "float32", "engine_threads": 1, "engine_kv_cache_memory": "63m", "cache_enabled": False}
    return spark_llm.enable(spark.newSession(), model=random_model, **options, optimizer_statistics_enabled=False)


def answers(session: SparkSession) -> dict[int, str]:
    return {row.id: row.a for row in session.range(0, ROWS, 1, 4).selectExpr("id", f"{ASK} AS a").collect()}


def test_engines_of_an_executor_answer_as_one(session: SparkSession) -> None:
    owner = session.sparkContext._jvm.java.lang.ProcessHandle.current().pid()
    before = {engine.pid for engine in list_engines()}
    expected = answers(session)
    assert len(expected) == ROWS
    assert len(set(expected.values())) > ROWS // 2, "which row an answer belongs to can be seen"
    coordination = install(session).coordination
    session.conf.set("spark.llm.engine.perExecutor", "2")
    assert answers(session) == expected
    engines = [engine for engine in list_engines() if engine.owner == owner and engine.pid not in before]
    assert len(engines) == 2
    assert all(engine.rows_answered and not engine.address for engine in engines), "both answer, none listens"
    assert coordination.server is None
    session.conf.set("spark.llm.router", "prefix")
    assert answers(session) == expected
    assert coordination.server is not None
    assert coordination.server.cost.rows > 0
    report = spark_llm.last_report(session)
    assert report is not None
    assert (report.rows, report.calls, report.failed) == (ROWS, ROWS, 0)
    session.conf.set("spark.llm.router", "local")
    asked = coordination.server.cost.rows
    assert answers(session) == expected
    assert coordination.server.cost.rows == asked
