"""OrderLlmPredicates: filters over several calls become one node, which asks what drops rows for the fewest tokens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_counting import FakeModel, fake_model
from plans import assert_idempotent, context, golden, optimized, settings, text
from pyspark.sql import DataFrame, Row, SparkSession

from spark_llm.call import GroupSpec
from spark_llm.optimizer.catalyst.bridge import Catalyst
from spark_llm.optimizer.catalyst.notes import Notes
from spark_llm.optimizer.rules.calls import all_calls
from spark_llm.optimizer.rules.order_llm_predicates import order_llm_predicates

pytestmark = pytest.mark.spark

ROWS = 300


def view(spark: SparkSession) -> None:
    """t: 300 rows in two partitions; n is unique, k has five values."""
    spark.range(0, ROWS, 1, 2).selectExpr(
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
        found.spark.conf.set("spark.llm.windowRows", 32)
        yield found


def groups(df: DataFrame) -> list[GroupSpec]:
    """The groups of the optimized plan, those that are evaluated first first."""
    calls = all_calls(optimized(df), Catalyst.of(df.sparkSession))
    return [call.group for call in calls if call.group is not None and call.member == 0]


def labels(df: DataFrame) -> list[list[str]]:
    """The prompts of each node's calls, those that are evaluated first first."""
    found: list[list[str]] = []
    for call in all_calls(optimized(df), Catalyst.of(df.sparkSession)):
        if call.member == 0:
            found.append([])
        found[-1].append(call.label)
    return found


def answer(number: int, text: str) -> list[object]:
    return ["=", ["answer", number], ["literal", text]]


def test_the_plan(t: SparkSession) -> None:
    settings(t, placeInstruction_enabled=False, reorderRows_enabled=False, deduplicatePrompts_enabled=False)
    df = t.sql("SELECT id FROM t WHERE llm('p', n) = 'x' AND id < 9 AND llm('q', n) = 'y'")
    shown = text(df).replace("cast(id as string)", "n").replace(groups(df)[0].encode(), "group")
    assert re.sub(r"Range .*", "Range", re.sub(r"[(]{.*}", "(group", shown)) == golden(
        """
        Project [id]
        +- Filter ((pythonUDF0 = x) AND (pythonUDF0 = y))
           +- Project [id, llm_group.a0 AS pythonUDF0, llm_group.a1 AS pythonUDF0]
              +- ArrowEvalPython [llm_group(group, p, n, q)], [llm_group], 204
                 +- Filter (id < 9)
                    +- Range
        """
    )
    [group] = groups(df)
    assert group.arguments == ((0, 1), (2, 1))
    assert list(group.conditions) == [answer(0, "x"), answer(1, "y")]


NODES = {
    "written order": ("llm('p', n) = 'x' AND llm('q', k) = 'y' AND llm('r', n) = 'z'", [["p", "q", "r"]]),
    "one conjunct over two calls": ("llm('p', n) = llm('q', n)", [["p", "q"]]),
    "another model": ("llm('p', n) = 'x' AND llm('q', n, model => 'm') = 'y'", [["p", "q"]]),
    "two conjuncts of a call": ("llm('p', n) > 'x' AND llm('q', n) = 'y' AND llm('p', n) < 'z'", [["p", "q"]]),
    "an answer of the other": ("llm('p', n) = 'x' AND llm('q', r => llm('p', n)) = 'y'", [["p"], ["q"]]),
    "compared with a column": ("llm('p', n) = 'x' AND llm('q', n) = k AND llm('r', n) = 'z'", [["p", "r"], ["q"]]),
    "not known, written first": (
        "llm('p', n) RLIKE 'x' AND llm('q', n) = 'y' AND llm('r', n) = 'z'",
        [["p"], ["q", "r"]],
    ),
    "not known over two": ("concat(llm('p', n), llm('q', k)) = 'x' AND llm('r', n) = 'z'", [["p"], ["q"], ["r"]]),
    "known and not": ("llm('p', n) = 'x' AND llm('q', n) = 'y' AND llm('q', n) RLIKE 'z'", [["p"], ["q"]]),
    "drawn": ("llm('p', n) = 'x' AND llm('q', n, temperature => 1.0) = 'y'", [["p"], ["q"]]),
    "drawn with a seed": ("llm('p', n) = 'x' AND llm('q', n, temperature => 1.0, seed => 1) = 'y'", [["p", "q"]]),
    "one call": ("llm('p', n) = 'x'", [["p"]]),
}


@pytest.mark.parametrize(("condition", "nodes"), NODES.values(), ids=list(NODES))
def test_which_calls_share_a_node(t: SparkSession, condition: str, nodes: list[list[str]]) -> None:
    df = t.sql(f"SELECT id FROM t WHERE {condition}")
    found = labels(df)
    # Spark itself puts conjuncts that it cannot tell apart where it likes.
    assert sorted(found) == sorted(nodes)
    assert [len(node) for node in found] == [len(node) for node in nodes] or len(nodes) == len(nodes[0])
    assert_idempotent(df)


def test_conditions_are_those_of_the_query(t: SparkSession) -> None:
    df = t.sql(
        "SELECT id FROM t WHERE llm('p', n) IN ('x', 'y') AND lower(llm('q', n)) LIKE '%z%' AND llm('p', n) != 'y'"
    )
    [group] = groups(df)
    assert len(group.calls) == 2
    assert group.limit == 0
    assert ["contains", ["lower", ["answer", 1]], ["literal", "z"]] in group.conditions


def test_notes_say_what_was_done(t: SparkSession) -> None:
    settings(t, orderLlmPredicates_enabled=False, reorderRows_enabled=False)
    df = t.sql("SELECT id FROM t WHERE llm('p', n) = 'x' AND llm('q', n) RLIKE 'y' AND llm('r', n) = 'z'")
    given = dataclasses.replace(context(t), notes=Notes())
    order_llm_predicates(optimized(df), given)
    assert [(note.call, note.fired) for note in given.notes.all()] == [("q", False), ("p", True), ("r", True)]


def test_rows_are_dropped_by_the_call_that_drops_most(model: FakeModel) -> None:
    """Spark asks in written order: 300 calls, and 150 about what the first leaves."""
    query = "SELECT id FROM t WHERE llm('mod 2', n) = '0' AND llm('mod 30', n) = '0'"
    df = model.spark.sql(query)
    assert {row.id for row in df.collect()} == set(range(0, ROWS, 30))
    calls = len(model.requests())
    # 300 of the second, of the first the 10 that it leaves, and the rows on which the tasks learnt.
    assert ROWS + 10 <= calls <= ROWS + 10 + 64
    model.forget()
    settings(model.spark, enabled=False)
    assert {row.id for row in model.spark.sql(query).collect()} == set(range(0, ROWS, 30))
    assert len(model.requests()) == ROWS + ROWS // 2


NINTH = "(SELECT *, llm('mod 9', n) AS r FROM t)"
EVEN, THIRD = "llm('mod 2', n) = '0'", "llm('mod 3', n) = '0'"
ANSWERS = "(SELECT *, llm('mod 2', n) AS a, llm('mod 3', n) AS b FROM t)"
NULLS = "llm('mod 2', nullif(n, '7')) IS NULL OR llm('mod 3', nullif(n, '8')) IS NULL"
QUERIES = {
    "three": f"SELECT id FROM t WHERE {EVEN} AND llm('mod 3', n) < '1' AND llm('mod 5', n) IN ('0', '1')",
    "with its answers": f"SELECT id, a, b FROM {ANSWERS} WHERE a = '1' AND b = '1'",
    "of one answer, and the other": f"SELECT id, a, b FROM {ANSWERS} WHERE b = '1'",
    "or": f"SELECT id FROM t WHERE ({EVEN} OR {THIRD}) AND llm('mod 5', n) = '0'",
    "is null": f"SELECT id FROM t WHERE {NULLS}",
    "compared": "SELECT id FROM t WHERE llm('mod 2', n) = llm('mod 3', n) AND cast(llm('mod 5', n) AS int) >= 3",
    "not known": f"SELECT id FROM t WHERE {EVEN} AND llm('mod 3', n) RLIKE '0' AND llm('mod 5', n) = '0'",
    "a computed argument": f"SELECT id FROM (SELECT id, upper(n) AS n FROM t) WHERE {EVEN} AND {THIRD}",
    "below a join": f"SELECT t.id FROM t JOIN (SELECT id, k FROM t) u USING (k) WHERE {EVEN} AND {THIRD} AND u.id < 5",
    "of both sides": f"SELECT id FROM t JOIN (SELECT id, n m FROM t) USING (id) WHERE {EVEN} AND llm('mod 7', m) = '0'",
    "in a subquery": f"SELECT id FROM t WHERE id IN (SELECT id + 1 FROM t WHERE {EVEN} AND {THIRD})",
    "upon an answer": f"SELECT id FROM {NINTH} WHERE r > '5' AND {EVEN} AND llm('mod 2', r) = '0'",
}


@pytest.mark.slow
@pytest.mark.parametrize("query", QUERIES.values(), ids=list(QUERIES))
def test_rows_are_the_same_and_calls_not_more(model: FakeModel, query: str) -> None:
    def run() -> tuple[list[Row], int]:
        model.forget()
        found = sorted(model.spark.sql(query).collect())
        return found, model.engine_calls()

    df = model.spark.sql(query)
    assert_idempotent(df)
    rows, calls = run()
    settings(model.spark, enabled=False)
    plain_rows, plain_calls = run()
    assert rows == plain_rows
    assert len(rows) > 0
    assert calls <= plain_calls + 64
