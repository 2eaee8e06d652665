"""How many calls each shape of query makes, with the rules and without, and that its rows are the same.

Calls are counted by the real service over a fake model (benchmarks/call_count_engine.py); the shapes, with the least
calls that their meaning allows, stand in benchmarks/call_count_shapes.py, from which docs/calls-made.md is made, too.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plans import settings
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

import spark_llm

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from call_count_engine import FakeCountingEngine, fake_counting_engine, fake_sums
from call_count_shapes import ROWS, SHAPES, A, Shape, make_tables

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def engine(spark: SparkSession) -> Iterator[FakeCountingEngine]:
    """The fake that counts, reached by every llm() call of this module."""
    with fake_counting_engine(spark, fake_sums) as found:
        yield found


@pytest.fixture(scope="module")
def session(spark: SparkSession, engine: FakeCountingEngine, tmp_path_factory: pytest.TempPathFactory) -> SparkSession:
    """A session with the shapes' tables, whose answers are not kept for later queries."""
    found = spark_llm.enable(spark.newSession(), cache_enabled=False)
    make_tables(found, tmp_path_factory.mktemp("tables"))
    return found


@pytest.fixture(autouse=True)
def configured(session: SparkSession, engine: FakeCountingEngine) -> Iterator[None]:
    """Each test starts without calls, and with the rules on."""
    settings(session, enabled=True)
    engine.forget()
    yield
    session.conf.set("spark.llm.cache.enabled", "false")


def rows(session: SparkSession, sql: str) -> list[str]:
    return [str(tuple(row)) for row in session.sql(sql).collect()]


def assert_same(shape: Shape, session: SparkSession, found: list[str], expected: list[str]) -> None:
    """The rows are those of the query without rules: in order, as a bag, or any that the LIMIT may take."""
    if shape.is_ordered:
        assert found == expected
    elif shape.whole:
        assert len(found) == len(expected)
        assert not Counter(found) - Counter(rows(session, shape.whole))
    else:
        assert Counter(found) == Counter(expected)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_calls_made(shape: Shape, session: SparkSession, engine: FakeCountingEngine) -> None:
    found = rows(session, shape.sql)
    made = engine.calls
    if shape.evaluated is not None:
        report = spark_llm.last_report(session)
        assert report is not None
        assert report.rows - report.skipped <= shape.evaluated
    engine.forget()
    settings(session, enabled=False)
    if shape.stock is None:
        with pytest.raises(AnalysisException, match="PYTHON_UDF_IN_ON_CLAUSE"):
            rows(session, shape.sql)
        expected = rows(session, shape.means)
    else:
        expected = rows(session, shape.sql)
        assert engine.calls == shape.stock
    assert_same(shape, session, found, expected)
    assert shape.least <= made <= shape.bound


def test_a_rerun_asks_nothing(session: SparkSession, engine: FakeCountingEngine) -> None:
    """The result cache answers a query that ran before, and the rows that another query shares with it."""
    session.conf.set("spark.llm.cache.enabled", "true")
    sql = f"SELECT id, {A} AS r FROM t WHERE id < 30"
    first = rows(session, sql)
    assert engine.calls == 30
    assert Counter(rows(session, sql)) == Counter(first)
    assert engine.calls == 30
    assert len(rows(session, f"SELECT id, {A} AS r FROM t")) == ROWS
    assert engine.calls == ROWS
    report = spark_llm.last_report(session)
    assert report is not None
    assert (report.rows, report.calls, report.stored) == (ROWS, 10, 30)


def test_show_then_collect(session: SparkSession, engine: FakeCountingEngine, capsys: Any) -> None:
    """``show`` asks for the rows that it prints and one more, to know of it; later actions ask for the rest."""
    session.conf.set("spark.llm.cache.enabled", "true")
    df = session.sql("SELECT id, llm('echo', body) AS r FROM t")
    df.show()
    assert engine.calls == 21
    assert len(df.collect()) == ROWS
    assert engine.calls == ROWS
    assert df.count() == ROWS
    df.show()
    assert engine.calls == ROWS


def test_without_the_result_cache_each_query_asks(session: SparkSession, engine: FakeCountingEngine) -> None:
    for times in (1, 2):
        rows(session, f"SELECT {A} AS r FROM t")
        assert engine.calls == times * ROWS
