"""FuseCalls: calls over the same fields are answered by one node, side by side, with the prompts that they had."""

from __future__ import annotations

import re

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent, golden, optimized, settings, text
from pyspark.sql import DataFrame, Row, SparkSession

from spark_llm.call import GroupSpec
from spark_llm.optimizer.catalyst.bridge import Catalyst
from spark_llm.optimizer.rules.calls import all_calls

pytestmark = pytest.mark.spark


def view(spark: SparkSession) -> None:
    """t: 60 rows in two partitions; n is unique, k has five values."""
    spark.range(0, 60, 1, 2).selectExpr(
        "id", "cast(id AS string) AS n", "cast(id % 5 AS string) AS k"
    ).createOrReplaceTempView("t")


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    view(echo)
    return echo


def nodes(df: DataFrame) -> list[list[str]]:
    """The prompts of each node's calls, those that are evaluated first first."""
    found: list[list[str]] = []
    for call in all_calls(optimized(df), Catalyst.of(df.sparkSession)):
        if call.member == 0:
            found.append([])
        found[-1].append(call.label)
    return found


def groups(df: DataFrame) -> list[GroupSpec]:
    calls = all_calls(optimized(df), Catalyst.of(df.sparkSession))
    return [call.group for call in calls if call.group is not None and call.member == 0]


def test_the_plan(t: SparkSession) -> None:
    settings(t, reorderRows_enabled=False)
    df = t.sql("SELECT llm('p', n, k) AS a, id, upper(llm('q', k, n)) AS b FROM t")
    [group] = groups(df)
    shown = re.sub(r"[(]{.*}", "(group", text(df).replace("cast(id as string)", "n"))
    assert re.sub(r"Range .*", "Range", shown) == golden(
        """
        Project [pythonUDF0 AS a, id, upper(pythonUDF0) AS b]
        +- Project [id, n, k, llm_group.a0 AS pythonUDF0, llm_group.a1 AS pythonUDF0]
           +- ArrowEvalPython [llm_group(group, p, n, k, q)], [llm_group], 204
              +- Project [id, n AS n, cast((id % 5) as string) AS k]
                 +- Range
        """
    )
    assert group.arguments == ((0, 1, 2), (3, 2, 1))
    assert not group.conditions
    assert not group.limit
    # What was decided for the calls, each on its own, stays: also how many ask later.
    assert [call.prompt.instruction_last for call in group.calls if call.prompt] == [True, True]
    assert [call.prompt.later_calls for call in group.calls if call.prompt] == [1, 0]
    assert [call.prompt.fields for call in group.calls if call.prompt] == [(1, 0), ()]


NODES = {
    "three": ("SELECT llm('p', n), llm('q', n), llm('r', n) FROM t", [["p", "q", "r"]]),
    "another between": ("SELECT llm('p', n), llm('q', k), llm('r', n) FROM t", [["p", "r"], ["q"]]),
    "two and two": ("SELECT llm('p', n), llm('q', k), llm('r', n), llm('s', k) FROM t", [["p", "r"], ["q", "s"]]),
    "on an answer": ("SELECT llm('p', r), llm('q', r) FROM (SELECT llm('o', n) AS r FROM t)", [["o"], ["p", "q"]]),
    "on each other": ("SELECT llm('p', n => llm('o', n), k) FROM t", [["o"], ["p"]]),
    "on both": (
        "SELECT r, llm('q', n), llm('s', n => r) FROM (SELECT *, llm('p', n) AS r FROM t)",
        [["p", "q"], ["s"]],
    ),
    "a prompt, two lengths": ("SELECT llm(n, max_tokens => 3), llm(n, max_tokens => 5) FROM t", None),
    "prompts without fields": ("SELECT llm(n), llm(k) FROM t", [["(a prompt for each row)"]] * 2),
    "other names": ("SELECT llm('p', n), llm('q', m => n) FROM t", [["p"], ["q"]]),
    "another model": ("SELECT llm('p', n), llm('q', n, model => 'm') FROM t", [["p"], ["q"]]),
    "another system text": ("SELECT llm('p', n), llm('q', n, system => 's') FROM t", [["p"], ["q"]]),
    "drawn": ("SELECT llm('p', n), llm('q', n, temperature => 1.0) FROM t", [["p"], ["q"]]),
    "below and above a filter": ("SELECT llm('p', n) FROM t WHERE llm('q', n) RLIKE 'x'", [["q"], ["p"]]),
    "of a union": ("SELECT llm('p', n) FROM t UNION ALL SELECT llm('q', n) FROM t", [["p"], ["q"]]),
    "below and above a limit": ("SELECT llm('p', n) FROM (SELECT *, llm('q', n) AS r FROM t ORDER BY r LIMIT 9)", None),
}


@pytest.mark.parametrize(("query", "expected"), NODES.values(), ids=list(NODES))
def test_which_calls_share_a_node(t: SparkSession, query: str, expected: list[list[str]] | None) -> None:
    df = t.sql(query)
    found = nodes(df)
    if expected is not None:
        assert sorted(found) == sorted(expected)
    elif "LIMIT" in query:
        assert all(len(node) == 1 for node in found)
    else:
        assert [len(node) for node in found] == [2]
    assert_idempotent(df)


def test_a_group_has_sixteen_calls_at_most(t: SparkSession) -> None:
    columns = [f"llm('p{number}', n)" for number in range(20)]
    df = t.sql(f"SELECT {', '.join(columns)} FROM t")
    assert sorted(map(len, nodes(df))) == [4, 16]
    row = df.first()
    assert row is not None
    assert [re.search(r'"(p\d+)"', answer)[1] for answer in row] == [f"p{number}" for number in range(20)]  # type: ignore[index]


QUERIES = {
    "two": "SELECT id, llm('p', n, k) AS a, llm('q', k, n) AS b FROM t",
    "two and two": "SELECT id, llm('p', n), llm('q', k), llm('r', n), llm('s', k) FROM t",
    "on an answer": "SELECT llm('p', r), llm('q', r), r FROM (SELECT llm('o', n) AS r FROM t)",
    "computed fields": "SELECT llm('p', f => upper(concat(n, k))), llm('q', f => upper(concat(n, k))) FROM t",
    "filtered": "SELECT id, llm('p', n), llm('q', n) FROM t WHERE llm('r', n) > '8'",
    "aggregated": "SELECT max(a), count(b), k FROM (SELECT k, llm('p', n) a, llm('q', n) b FROM t) GROUP BY k",
    "conditional": "SELECT id, if(id > 20, llm('p', n), 'x') AS a, if(id > 20, llm('q', n), 'y') AS b FROM t",
    "null fields": "SELECT llm('p', nullif(n, '3')), llm('q', nullif(n, '3')) FROM t",
}


@pytest.mark.slow
@pytest.mark.parametrize("query", QUERIES.values(), ids=list(QUERIES))
def test_the_same_prompts_and_rows(model: FakeModel, query: str) -> None:
    def run() -> tuple[list[Row], set[tuple[object, ...]], int]:
        model.forget()
        found = sorted(model.spark.sql(query).collect(), key=str)
        return found, {request.exact for request in model.requests()}, model.engine_calls()

    view(model.spark)
    assert_idempotent(model.spark.sql(query))
    assert groups(model.spark.sql(query))
    fused = run()
    settings(model.spark, fuseCalls_enabled=False)
    assert run() == fused
