"""ReuseAnswers: a call that stands in several places of a query runs once."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent
from pyspark.sql import Row, SparkSession

from spark_llm.config import entries

pytestmark = pytest.mark.spark


@pytest.fixture
def tables(model: FakeModel) -> FakeModel:
    """t: 40 rows in 4 partitions, all texts different; u: 5 keys, of which 4 have rows in t."""
    make_tables(model.spark)
    return model


def make_tables(session: SparkSession) -> None:
    session.range(0, 40, 1, 4).selectExpr(
        "id", "id % 7 AS k", "concat('x', id) AS text", "concat('c', id % 3) AS kind"
    ).createOrReplaceTempView("t")
    session.range(3, 8, 1, 2).selectExpr("id AS k", "concat('d', id) AS d").createOrReplaceTempView("u")


def only(session: SparkSession, *names: str) -> None:
    """Let these rules run and no others."""
    set_rules(session, names)


def everything(session: SparkSession) -> None:
    set_rules(session, None)


def set_rules(session: SparkSession, names: tuple[str, ...] | None) -> None:
    for key in entries():
        parts = key.split(".")
        if parts[2:3] == ["optimizer"] and parts[4:] == ["enabled"]:
            session.conf.set(key, str(names is None or parts[3] in names).lower())


def outcome(model: FakeModel, query: str) -> tuple[Counter[Row], int]:
    model.forget()
    rows = Counter(model.spark.sql(query).collect())
    return rows, len(model.requests())


CALL = "llm('p', text)"
SUBQUERY = f"(SELECT id, k, kind, text, {CALL} AS r FROM t)"


@pytest.mark.parametrize(
    ("query", "once", "stock"),
    [
        (f"SELECT id, {CALL} AS r FROM t WHERE {CALL} >= '0'", 40, 80),
        (f"SELECT id, {CALL} AS r, {CALL} AS s FROM t WHERE {CALL} >= '0' AND {CALL} IS NOT NULL", 40, 80),
        (f"SELECT id, r FROM {SUBQUERY} WHERE r >= '0' AND k = 3", 6, 12),
        (f"SELECT * FROM (SELECT * FROM {SUBQUERY} WHERE r >= '0') WHERE r < 'g'", 40, 80),
        (f"SELECT x.id, r FROM {SUBQUERY} x JOIN (SELECT concat('d', id) AS s FROM range(9)) ON r = s", 40, 80),
        (f"SELECT id, upper(r) AS r FROM {SUBQUERY} WHERE r >= '0' ORDER BY id LIMIT 20", 40, 80),
        (f"SELECT id, upper(r) AS r FROM {SUBQUERY} WHERE r >= '0' ORDER BY r", 40, 160),
        (f"SELECT id, {CALL} AS s, d FROM {SUBQUERY} x JOIN u USING (k) WHERE r >= '0'", 40, 62),
        (f"SELECT id, {CALL} AS s, d FROM {SUBQUERY} x LEFT JOIN u USING (k) WHERE r >= '0'", 40, 80),
        (f"SELECT id, d, {CALL} AS s FROM u RIGHT JOIN {SUBQUERY} x USING (k) WHERE r >= '0'", 40, 80),
        (f"SELECT id, {CALL} AS s FROM {SUBQUERY} x LEFT SEMI JOIN u ON x.k = u.k WHERE r >= '0'", 40, 62),
        (f"SELECT id, {CALL} AS s, v FROM {SUBQUERY} LATERAL VIEW explode(array(k, id)) AS v WHERE r >= '0'", 40, None),
        (
            f"SELECT id, {CALL} AS s, w FROM (SELECT *, rank() OVER (PARTITION BY k ORDER BY r) AS w FROM {SUBQUERY})"
            " WHERE w < 3",
            40,
            None,
        ),
        (f"SELECT id, {CALL} AS s FROM (SELECT /*+ REPARTITION(3) */ * FROM {SUBQUERY} WHERE r >= '0')", 40, 80),
        (f"SELECT id, llm('q', r => r) AS s FROM {SUBQUERY} WHERE r >= '0'", 80, 120),
        (f"SELECT id, llm('q', r => r) AS s FROM {SUBQUERY} WHERE llm('q', r => r) >= '0'", 80, 160),
        (f"SELECT id, kind, {CALL} AS s FROM t WHERE kind = 'c1' AND llm('p', kind) >= '0'", None, None),
        ("SELECT id, llm('p', kind, id) AS s FROM t WHERE id = 7 AND llm('p', kind, id) >= '0'", 1, 2),
    ],
)
def test_runs_once(tables: FakeModel, query: str, once: int | None, stock: int | None) -> None:
    only(tables.spark, "reuseAnswers", "shuffleBelowSort")
    rows, calls = outcome(tables, query)
    only(tables.spark)
    rows_off, calls_off = outcome(tables, query)
    assert rows == rows_off
    print(query, calls, calls_off)
    assert once is None or calls == once
    assert stock is None or calls_off == stock
    assert calls <= calls_off
    everything(tables.spark)
    assert_idempotent(tables.spark.sql(query))
    rows_all, calls_all = outcome(tables, query)
    assert rows_all == rows
    assert calls_all <= calls
