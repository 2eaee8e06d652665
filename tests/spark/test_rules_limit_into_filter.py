"""LIMIT over a filter on calls: predicate and n go into the node, tasks stop at n, and no wrong row comes out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_counting import FakeModel, fake_model
from plans import assert_idempotent, context, golden, optimized, settings, text
from pyspark.sql import DataFrame, SparkSession

from spark_llm.call import GroupSpec
from spark_llm.optimizer.catalyst.bridge import Catalyst
from spark_llm.optimizer.catalyst.notes import Notes
from spark_llm.optimizer.rules.calls import all_calls
from spark_llm.optimizer.rules.limit_into_filter import limit_into_filter

pytestmark = pytest.mark.spark

ROWS = 400


def view(spark: SparkSession) -> None:
    """t: 400 rows in four partitions; n is unique, k has five values."""
    spark.range(0, ROWS, 1, 4).selectExpr(
        "id", "cast(id AS string) AS n", "cast(id % 5 AS string) AS k"
    ).createOrReplaceTempView("t")


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    view(echo)
    return echo


@pytest.fixture
def model(spark: SparkSession, tmp_path: Path) -> Iterator[FakeModel]:
    """'mod m' over a field with a number answers its remainder, other prompts the length of the message."""

    def answer(message: str) -> str:
        import re

        divisor, number = re.search(r"mod (\d+)", message), re.search(r': "(\d+)"', message)
        return str(int(number[1]) % int(divisor[1])) if divisor and number else str(len(message))

    with fake_model(spark, tmp_path, reads_order=True, answers=answer) as found:
        view(found.spark)
        yield found


def groups(df: DataFrame) -> list[GroupSpec]:
    """The groups of the optimized plan, those that are evaluated first first."""
    calls = all_calls(optimized(df), Catalyst.of(df.sparkSession))
    return [call.group for call in calls if call.group is not None and call.member == 0]


def limits(df: DataFrame) -> list[tuple[int, int, int]]:
    """Of each group: calls, conditions, limit."""
    return [(len(group.calls), len(group.conditions), group.limit) for group in groups(df)]


def test_the_plan(t: SparkSession) -> None:
    df = t.sql("SELECT id FROM t WHERE llm('p', n) = 'x' LIMIT 5")
    shown = re.sub(r"[(]{.*}", "(group", text(df).replace("cast(id as string)", "n"))
    assert re.sub(r"Range .*", "Range", shown) == golden(
        """
        GlobalLimit 5
        +- LocalLimit 5
           +- Project [id]
              +- Filter (pythonUDF0 = x)
                 +- Project [id, llm_group.a0 AS pythonUDF0]
                    +- ArrowEvalPython [llm_group(group, p, n)], [llm_group], 204
                       +- Range
        """
    )
    [group] = groups(df)
    assert group.conditions == (["=", ["answer", 0], ["literal", "x"]],)
    assert group.limit == 5
    assert group.node
    [rows] = [call.rows for call in group.calls]
    assert rows is not None
    assert rows.fold
    assert "can be seen" in rows.order_why
    assert_idempotent(df)


X, Y = "llm('p', n) = 'x'", "llm('q', n) = 'y'"
LIMITED = {
    "offset": (f"SELECT id FROM t WHERE {X} LIMIT 5 OFFSET 3", [(1, 1, 8)]),
    "two calls": (f"SELECT id FROM t WHERE {X} AND {Y} LIMIT 5", [(2, 2, 5)]),
    "a cheap conjunct": (f"SELECT id FROM t WHERE {X} AND id < 9 LIMIT 5", [(1, 1, 5)]),
    "a projection": (
        "SELECT upper(r) AS u FROM (SELECT *, llm('p', n) AS r FROM t) WHERE r = 'x' LIMIT 5",
        [(1, 1, 5)],
    ),
    "a call above": (f"SELECT llm('q', n) FROM t WHERE {X} LIMIT 5", [(1, 1, 5)]),
    "branches": (f"SELECT id FROM t WHERE {X} UNION ALL SELECT id FROM t WHERE {Y} LIMIT 5", [(1, 1, 5), (1, 1, 5)]),
    "the smaller": (f"SELECT id FROM (SELECT id FROM t WHERE {X} LIMIT 5) LIMIT 9", [(1, 1, 5)]),
    "below a join": (f"SELECT * FROM (SELECT k FROM t WHERE {X} LIMIT 5) JOIN t USING (k)", [(1, 1, 5)]),
    "left of an outer join": (
        "SELECT t.n FROM t LEFT JOIN t u USING (k) WHERE llm('p', t.n) = 'x' LIMIT 5",
        [(1, 1, 5)],
    ),
    "not known: windows grow": ("SELECT id FROM t WHERE llm('p', n) RLIKE 'x' LIMIT 5", [(1, 0, 5)]),
    "kept without an answer: windows grow": ("SELECT id FROM t WHERE llm('p', n) IS NULL LIMIT 5", [(1, 0, 5)]),
    "either call": ("SELECT id FROM t WHERE llm('p', n) < 'x' OR llm('q', k) IS NULL LIMIT 5", None),
    "no limit": (f"SELECT id FROM t WHERE {X}", []),
    "sorted": (f"SELECT id FROM t WHERE {X} ORDER BY k LIMIT 5", []),
    "aggregated": (f"SELECT k, count(*) FROM t WHERE {X} GROUP BY k LIMIT 5", []),
    "distinct": (f"SELECT DISTINCT k FROM t WHERE {X} LIMIT 5", []),
    "a window": (f"SELECT rank() OVER (PARTITION BY k ORDER BY id) FROM t WHERE {X} LIMIT 5", []),
    "exploded": (f"SELECT explode(split(k, ',')) FROM t WHERE {X} LIMIT 5", []),
    "drawn": ("SELECT id FROM t WHERE llm('p', n, temperature => 1.0) = 'x' LIMIT 5", []),
    "a drawn column": (f"SELECT id FROM (SELECT id, n, rand() AS r FROM t) WHERE r > 0.5 AND {X} LIMIT 5", [(1, 1, 5)]),
    "joined": ("SELECT a.n FROM t a JOIN t b USING (k) WHERE llm('p', a.n) = 'x' AND b.id > 3 LIMIT 5", []),
}


@pytest.mark.parametrize(("query", "expected"), LIMITED.values(), ids=list(LIMITED))
def test_which_nodes_know_the_limit(t: SparkSession, query: str, expected: list[tuple[int, int, int]] | None) -> None:
    df = t.sql(query)
    if expected is None:
        assert not any(limit and conditions for _, conditions, limit in limits(df))
    else:
        assert limits(df) == expected
    assert_idempotent(df)


def test_show_and_take_are_limits(t: SparkSession) -> None:
    assert limits(t.sql(f"SELECT id FROM t WHERE {X}").limit(3)) == [(1, 1, 3)]


def test_nodes_of_a_query_are_told_apart(t: SparkSession) -> None:
    some = f"(SELECT id FROM t WHERE {X} LIMIT 5)"
    df = t.sql(f"WITH s AS {some} SELECT id FROM s UNION ALL SELECT id + 1 FROM s UNION ALL {some}")
    assert {limit for _, _, limit in limits(df)} == {5}
    # What the rules themselves let run once may stand in the plan twice: it is one node.
    found = {(group.node, group.encode()) for group in groups(df)}
    assert len({node for node, _ in found}) == len(found)


def test_notes_say_what_was_done(t: SparkSession) -> None:
    settings(t, limitBeforeCalls_enabled=False)
    df = t.sql("SELECT id FROM t WHERE llm('p', n) = 'x' LIMIT 5")
    given = dataclasses.replace(context(t), notes=Notes())
    limit_into_filter(optimized(df), given)
    assert [(note.call, note.fired, note.why) for note in given.notes.all()] == [
        ("p", True, "stops at 5 rows that the filter keeps")
    ]


def test_only_as_many_rows_are_asked_as_it_takes(model: FakeModel) -> None:
    """Every 10th row is a hit. Spark asks a whole partition; we ask the rows up to the fifth hit at most twice over."""
    query = "SELECT id FROM t WHERE llm('mod 10', n) = '3' LIMIT 5"
    rows = model.spark.sql(query).collect()
    assert len({row.id for row in rows}) == 5
    assert all(row.id % 10 == 3 for row in rows)
    # One task has its fifth hit in row 44; with others at work each may have a window more.
    assert len(model.requests()) <= 2 * 44 + 64
    model.forget()
    assert len(model.spark.sql(query.replace("5", "300")).collect()) == 40
    assert len(model.requests()) == ROWS


def test_one_task_asks_at_most_twice_the_rows(model: FakeModel) -> None:
    model.spark.range(0, ROWS, 1, 1).createOrReplaceTempView("one")
    df = model.spark.sql("SELECT id FROM one WHERE llm('mod 10', n => string(id)) = '3' LIMIT 2")
    assert [row.id for row in df.collect()] == [3, 13]
    assert len(model.requests()) <= 2 * 14


@pytest.mark.parametrize("exchange", ["REPARTITION(3)", "REPARTITION(3, k)", "REBALANCE", "COALESCE(1)"])
def test_a_limit_counts_through_an_exchange(model: FakeModel, exchange: str) -> None:
    df = model.spark.sql(f"SELECT /*+ {exchange} */ * FROM t WHERE llm('mod 10', n) = '3'").limit(5)
    assert limits(df) == [(1, 1, 5)]
    assert_idempotent(df)
    rows = df.collect()
    assert len({row.id for row in rows}) == 5
    assert all(row.id % 10 == 3 for row in rows)
    assert len(model.requests()) <= 2 * 44 + 64


def test_no_limit_counts_through_an_exchange_by_ranges(t: SparkSession) -> None:
    """Spark runs what is below it once more, to learn the ranges."""
    assert limits(t.sql(f"SELECT /*+ REPARTITION_BY_RANGE(3, k) */ * FROM t WHERE {X}").limit(5)) == []


ANSWERS = "(SELECT *, llm('mod 4', n) AS a, llm('mod 3', n) AS b FROM t)"
QUERIES = {
    "two calls": ("SELECT id FROM t WHERE llm('mod 4', n) = '1' AND llm('mod 3', n) = '2'", lambda i: i % 12 == 5),
    "answers": (f"SELECT id, a, b FROM {ANSWERS} WHERE a = '1' AND b = '2'", lambda i: i % 12 == 5),
    "of one answer, and the other": (f"SELECT id, a, b FROM {ANSWERS} WHERE b = '2'", lambda i: i % 3 == 2),
    "either": (f"SELECT id, a, b FROM {ANSWERS} WHERE a = '1' OR b = '2'", lambda i: i % 4 == 1 or i % 3 == 2),
    "numbers": ("SELECT id FROM t WHERE cast(llm('mod 9', n) AS int) >= 7", lambda i: i % 9 >= 7),
    "not known": ("SELECT id FROM t WHERE llm('mod 9', n) RLIKE '[78]'", lambda i: i % 9 >= 7),
    "no answer": ("SELECT id FROM t WHERE llm('mod 9', nullif(n, '7')) IS NULL", lambda i: i == 7),
    "not": (
        "SELECT id FROM t WHERE NOT (llm('mod 9', n) = '3' OR llm('mod 9', n) <=> '4')",
        lambda i: i % 9 not in (3, 4),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("query", "is_right"), QUERIES.values(), ids=list(QUERIES))
@pytest.mark.parametrize("needed", [3, 1000])
def test_rows_are_right_and_as_many(model: FakeModel, query: str, is_right: Callable[[int], bool], needed: int) -> None:
    rows = model.spark.sql(f"{query} LIMIT {needed}").collect()
    assert len({row.id for row in rows}) == len(rows) == min(needed, sum(map(is_right, range(ROWS))))
    assert all(is_right(row.id) for row in rows)
    for row in rows:
        if "a" in row:
            assert (row.a, row.b) == (str(row.id % 4), str(row.id % 3))


def test_a_sort_above_gets_all_rows(model: FakeModel) -> None:
    """Spark runs what is below a global sort twice where nothing shuffles between, to learn ranges."""
    rows = "(SELECT id, string(id) AS n FROM range(0, 50, 1, 1))"
    one = f"(SELECT id FROM {rows} WHERE llm('mod 4', n) = '1' LIMIT 5)"
    df = model.spark.sql(f"SELECT * FROM ({one} UNION ALL {one}) ORDER BY id")
    found = [row.id for row in df.collect()]
    assert len(found) == 10
    assert found == sorted(found)
    assert all(number % 4 == 1 for number in found)
