"""ReuseAnswers: a call that stands in several places of a query runs once."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import msgspec
import pytest
from fake_counting import FakeModel
from plans import context, golden, optimized, specs, text
from pyspark.sql import DataFrame, Row, SparkSession

from spark_llm.config import entries
from spark_llm.optimizer.catalyst.bridge import Catalyst, Node
from spark_llm.optimizer.rules.calls import all_calls, calls_of, rebuilt, rewrite
from spark_llm.optimizer.rules.reuse_answers import reuse_answers, share_answers

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
    assert once is None or calls == once
    assert stock is None or calls_off == stock
    assert calls <= calls_off


def test_the_lower_answer_is_carried_up(tables: FakeModel) -> None:
    only(tables.spark, "reuseAnswers")
    df = tables.spark.sql(f"SELECT id, r FROM {SUBQUERY} x LEFT JOIN u USING (k) WHERE r >= '5'")
    assert_idempotent_alone(df)
    assert text(df) == golden("""
        Project [id, r]
        +- Join LeftOuter, (k = k)
           :- Project [id, (id % 7) AS k, pythonUDF0 AS r]
           :  +- Filter (pythonUDF0 >= 5)
           :     +- ArrowEvalPython [llm(spec, p, concat(x, cast(id as string)))], [pythonUDF0], 204
           :        +- Range (0, 40, step=1, splits=Some(4))
           +- Project [id AS k]
              +- Range (3, 8, step=1, splits=Some(2))
    """)


@pytest.mark.parametrize(
    "query",
    [
        f"SELECT {CALL} AS r, {CALL[:-1]}, max_tokens => 3) AS s FROM t",
        f"SELECT {CALL} AS r, llm('p', text => kind) AS s FROM t",
        f"SELECT {CALL} AS r, {CALL[:-1]}, order => 'as_written') AS s FROM t",
        "SELECT id, llm('p', text, temperature => 1) AS s FROM t WHERE llm('p', text, temperature => 1) > '3'",
        f"SELECT y.k, llm('p', y.r) AS s FROM u LEFT JOIN (SELECT k, {CALL} AS r FROM t) y USING (k)",
    ],
)
def test_calls_that_differ_or_are_drawn_stay(tables: FakeModel, query: str) -> None:
    only(tables.spark, "reuseAnswers")
    assert len(specs(tables.spark.sql(query))) == 2


def test_nulls_of_an_outer_join_are_not_its_sides_answers(tables: FakeModel) -> None:
    only(tables.spark, "reuseAnswers")
    side = "(SELECT k, text, llm('p', coalesce(text, 'none')) AS r FROM t WHERE id < 7)"
    query = f"SELECT u.k, r, llm('p', coalesce(y.text, 'none')) AS s FROM u LEFT JOIN {side} y ON u.k = y.k"
    assert len(specs(tables.spark.sql(query))) == 2


def masked(node: Node, column: str, catalyst: Catalyst, spark: SparkSession) -> Node:
    """The call asking only for rows in which the BOOLEAN column is true."""
    mask = next(node.child().output().apply(i) for i in range(9) if node.child().output().apply(i).name() == column)
    calls = [
        dataclasses.replace(call, mask=mask, spec=msgspec.structs.replace(call.spec, masked=True))
        for call in calls_of(node)
    ]
    return rebuilt(node, calls, catalyst)


@pytest.mark.parametrize(
    ("masks", "asked", "shows"),
    [
        # The masks of the lower and of the upper call; the mask of the one that is left.
        ((None, "m"), "text", ["if (m) pythonUDF0 else null"]),
        (("m", None), "text", ["if (m) pythonUDF0 else null"]),
        (("m", "m"), "m", []),
        (("m", "n"), "m OR n", ["if (m) pythonUDF0 else null", "if (n) pythonUDF0 else null"]),
    ],
)
def test_masks(tables: FakeModel, masks: tuple[str | None, str | None], asked: str, shows: list[str]) -> None:
    session = tables.spark
    only(session)
    catalyst = Catalyst.of(session)
    session.range(9).selectExpr("id", "id > 3 AS m", "id < 5 AS n", "string(id) AS text").createOrReplaceTempView("b")
    plan = optimized(session.sql(f"SELECT id, m, n, text, {CALL} AS r, llm('q', text) AS s FROM b"))
    wanted = iter(masks)

    def change(node: Node) -> Node:
        call = calls_of(node)[0]
        same = dataclasses.replace(call, prompt=catalyst.literal("p"))
        node, mask = rebuilt(node, [same], catalyst), next(wanted)
        return node if mask is None else masked(node, mask, catalyst, session)

    doubled = rewrite(plan, catalyst, change)
    once = reuse_answers(doubled, context(session))
    assert catalyst.problem(doubled, once) is None
    assert reuse_answers(once, context(session)).fastEquals(once)
    calls = list(all_calls(once, catalyst))
    assert len(calls) == 1
    shown = re.sub(r"#\d+L?", "", once.toString())
    last = re.sub(r"#\d+L?", "", calls[0].arguments[-1].toString())
    assert last.strip("()") == asked
    assert calls[0].spec.masked == (asked != "text")
    assert all(each in shown for each in shows)


CTE = f"WITH c AS (SELECT id, k, kind, {CALL} AS r FROM t) "


@pytest.mark.parametrize("adaptive", ["true", "false"])
@pytest.mark.parametrize(
    "query",
    [
        CTE + "SELECT x.id, y.id AS s, x.r FROM c x JOIN c y ON x.r = y.r",
        CTE + "SELECT id, r FROM c WHERE r < '8' UNION ALL SELECT k, r FROM c",
        CTE + "SELECT id, r FROM c WHERE k < 3 UNION ALL SELECT k, kind || r FROM c",
        CTE + "SELECT max(r) AS r FROM c UNION ALL SELECT r FROM c ORDER BY r",
    ],
)
def test_branches_run_a_call_once(tables: FakeModel, query: str, adaptive: str) -> None:
    session = tables.spark
    only(session, "reuseAnswers", "shuffleBelowSort")
    session.conf.set("spark.sql.adaptive.enabled", adaptive)
    tables.forget()
    df = session.sql(query)
    assert_idempotent_alone(df)
    found = Counter(df.collect())
    assert "ReusedExchange" in df._jdf.queryExecution().executedPlan().toString()
    assert len(tables.requests()) == 40
    only(session)
    assert Counter(session.sql(query).collect()) == found


def test_all_rules_together_keep_branches_alike(tables: FakeModel) -> None:
    everything(tables.spark)
    found, calls = outcome(tables, CTE + "SELECT x.id, y.id AS s, x.r FROM c x JOIN c y ON x.r = y.r WHERE y.k < 3")
    assert calls == 40
    only(tables.spark)
    assert outcome(tables, CTE + "SELECT x.id, y.id AS s, x.r FROM c x JOIN c y ON x.r = y.r WHERE y.k < 3")[0] == found


def test_branches_that_differ_or_have_an_order_are_left_alone(tables: FakeModel) -> None:
    only(tables.spark, "reuseAnswers")
    for query in (
        CTE + "SELECT id, r FROM c WHERE k = 1 UNION ALL SELECT id, r FROM c WHERE k = 2",
        f"SELECT {CALL} AS r FROM t UNION ALL SELECT llm('p', text, max_tokens => 3) FROM t",
        f"SELECT {CALL} AS r FROM t UNION ALL SELECT {CALL} FROM (SELECT concat('x', id) AS text FROM range(9))",
    ):
        assert "RepartitionByExpression" not in text(tables.spark.sql(query))


def assert_idempotent_alone(df: DataFrame) -> None:
    """Both halves of the rule leave the plan that they made as it is."""
    plan = optimized(df)
    for rule in (reuse_answers, share_answers):
        assert rule(plan, context(df.sparkSession)).fastEquals(plan)
