"""LimitBeforeCalls: a LIMIT that does not depend on a call runs before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from fake_counting import FakeModel
from plans import context, golden, optimized, rows, settings, text
from pyspark.sql import DataFrame, Row, SparkSession

from spark_llm.config import entries
from spark_llm.optimizer.rules import RULES

pytestmark = pytest.mark.spark

CALL = "llm('p', text)"
SUBQUERY = f"(SELECT id, k, text, {CALL} AS r FROM t)"


@pytest.fixture
def tables(model: FakeModel) -> FakeModel:
    """t: 40 rows in 4 partitions, all texts different; u: 5 keys, of which 4 have rows in t."""
    model.spark.range(0, 40, 1, 4).selectExpr("id", "id % 7 AS k", "concat('x', id) AS text").createOrReplaceTempView(
        "t"
    )
    model.spark.range(3, 8, 1, 2).selectExpr("id AS k", "concat('d', id) AS d").createOrReplaceTempView("u")
    return model


# Those that LimitBeforeCalls has to get along with: its own moves, not those of other rules, are tested here.
WITH = ("reuseAnswers", "limitBeforeCalls", "deduplicatePrompts", "reorderRows", "shuffleBelowSort")


def only(session: SparkSession, *names: str) -> None:
    """Let these rules run and no others."""
    for key in entries():
        parts = key.split(".")
        if parts[2:3] == ["optimizer"] and parts[4:] == ["enabled"]:
            session.conf.set(key, str(parts[3] in names).lower())


def assert_stable(df: DataFrame, names: Sequence[str]) -> None:
    """These rules leave the plan that they made as it is."""
    plan = optimized(df)
    for rule in RULES:
        if rule.name in names:
            again = rule.apply(plan, context(df.sparkSession))
            assert again.fastEquals(plan), f"{rule.name} changes {plan.toString()}\nto\n{again.toString()}"


def outcome(model: FakeModel, query: str) -> tuple[list[Row], int]:
    model.forget()
    found = model.spark.sql(query).collect()
    return found, len(model.requests())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "least"),
    [
        (f"SELECT id, {CALL} AS r FROM t ORDER BY id LIMIT 3", 3),
        (f"SELECT id, {CALL} AS r FROM t ORDER BY id DESC LIMIT 3 OFFSET 2", 3),
        (f"SELECT id, upper(r) AS r FROM {SUBQUERY} ORDER BY upper(text) DESC, id LIMIT 3", 3),
        (f"SELECT id, r FROM (SELECT * FROM {SUBQUERY} ORDER BY id LIMIT 20) ORDER BY id DESC LIMIT 3", 3),
        (f"SELECT id, {CALL} AS r, llm('q', text) AS s FROM t ORDER BY k, id LIMIT 3", 6),
        (f"SELECT id, {CALL} AS r, llm('q', r => {CALL}) AS s FROM t ORDER BY k, id LIMIT 3", 6),
        (f"SELECT id, r, llm('q', r => r) AS s FROM {SUBQUERY} ORDER BY r, id LIMIT 3", 43),
        (f"SELECT id, r FROM {SUBQUERY} ORDER BY r, id LIMIT 3", 40),
        (f"SELECT id, d, {CALL} AS r FROM t LEFT JOIN u USING (k) ORDER BY id LIMIT 3", 3),
        (f"SELECT id, d, {CALL} AS r FROM t JOIN u USING (k) ORDER BY id LIMIT 3", 3),
        (
            "SELECT k, llm('p', k) AS r, n FROM (SELECT k, count(*) AS n FROM t GROUP BY k) ORDER BY n DESC, k LIMIT 3",
            3,
        ),
        (f"SELECT id, w, {CALL} AS r FROM (SELECT *, rank() OVER (ORDER BY k, id) AS w FROM t) ORDER BY w LIMIT 3", 3),
        (f"SELECT max(r) AS r FROM (SELECT {CALL} AS r FROM t ORDER BY id LIMIT 5)", 5),
        (f"SELECT id, r FROM (SELECT id, {CALL} AS r FROM t ORDER BY id LIMIT 5) WHERE r >= '0'", 5),
        (f"SELECT id FROM u JOIN (SELECT id, k, {CALL} AS r FROM t ORDER BY id LIMIT 5) x USING (k) WHERE r >= '0'", 5),
        (f"SELECT id, {CALL} AS r FROM t ORDER BY id LIMIT ALL", 40),
        (f"SELECT id, {CALL} AS r FROM t LIMIT 0", 0),
        (f"SELECT id, {CALL} AS r FROM t ORDER BY id OFFSET 35", 5),
        (f"SELECT id, upper(r) AS r, llm('q', text) AS s FROM {SUBQUERY} ORDER BY upper(text) DESC OFFSET 30", 20),
        (f"SELECT id, r FROM {SUBQUERY} ORDER BY r, id OFFSET 35", 40),
        (f"SELECT id, {CALL} AS r FROM t ORDER BY id OFFSET 50", 0),
        (f"SELECT id, r FROM (SELECT id, {CALL} AS r FROM t ORDER BY k, id OFFSET 30) ORDER BY id DESC", 10),
    ],
)
def test_limited_rows_are_the_same(tables: FakeModel, query: str, least: int) -> None:
    only(tables.spark, *WITH)
    found, calls = outcome(tables, query)
    assert_stable(tables.spark.sql(query), WITH)
    settings(tables.spark, enabled=False)
    found_off, calls_off = outcome(tables, query)
    assert found == found_off
    assert calls == least <= calls_off


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "limit", "least"),
    [
        (f"SELECT id, {CALL} AS r FROM t{{}}", "LIMIT 3", 3),
        (f"SELECT id, {CALL} AS r FROM t{{}}", "LIMIT 15", 15),
        (f"SELECT id, {CALL} AS r FROM t{{}}", "LIMIT 15 OFFSET 4", 15),
        (f"SELECT id, {CALL} AS r FROM t{{}}", "LIMIT 100", 40),
        (f"SELECT id, {CALL} AS r FROM t{{}}", "OFFSET 15", 25),
        (f"SELECT id, {CALL} AS r FROM t WHERE id > 8{{}}", "LIMIT 5", 5),
        (f"SELECT id, upper(r) AS r FROM {SUBQUERY}{{}}", "LIMIT 5", 5),
        (f"SELECT id, r FROM {SUBQUERY} UNION ALL SELECT k, d FROM u{{}}", "LIMIT 15", 15),
        (f"SELECT id, r FROM {SUBQUERY} UNION ALL SELECT id, llm('q', text) FROM t{{}}", "LIMIT 15", 15),
        (f"SELECT id, d, r FROM {SUBQUERY} x LEFT JOIN u USING (k){{}}", "LIMIT 15", 15),
        (f"SELECT id, d, r FROM u RIGHT JOIN {SUBQUERY} x USING (k){{}}", "LIMIT 15", 15),
        (f"SELECT id, {CALL} AS r, row_number() OVER (ORDER BY id) AS w FROM t{{}}", "LIMIT 5", 5),
        ("SELECT k, llm('p', k) AS r FROM (SELECT DISTINCT k FROM t){}", "LIMIT 5", 5),
    ],
)
def test_any_rows_will_do(tables: FakeModel, query: str, limit: str, least: int) -> None:
    only(tables.spark, *WITH)
    limited = query.format(f" {limit}")
    found, calls = outcome(tables, limited)
    assert_stable(tables.spark.sql(limited), WITH)
    settings(tables.spark, enabled=False)
    whole, _ = outcome(tables, query.format(""))
    found_off, _ = outcome(tables, limited)
    assert len(found) == len(found_off)
    assert not Counter(found) - Counter(whole)
    assert calls == least


def test_a_limit_in_a_subquery_takes_its_rows_from_all_partitions(tables: FakeModel) -> None:
    only(tables.spark, *WITH)
    query = f"SELECT count(r) AS n FROM (SELECT {CALL} AS r FROM t LIMIT 5)"
    assert outcome(tables, query) == ([Row(n=5)], 5)
    settings(tables.spark, enabled=False)
    assert outcome(tables, query) == ([Row(n=5)], 20)


def test_topk_runs_first(tables: FakeModel) -> None:
    only(tables.spark, "limitBeforeCalls")
    query = f"SELECT id, upper(r) AS r FROM {SUBQUERY} ORDER BY text DESC LIMIT 3"
    assert text(tables.spark.sql(query)) == golden("""
        Project [id, r]
        +- Project [id, upper(pythonUDF0) AS r, concat(x, cast(id as string)) AS text]
           +- ArrowEvalPython [llm(spec, p, concat(x, cast(id as string)))], [pythonUDF0], 204
              +- GlobalLimit 3
                 +- LocalLimit 3
                    +- Sort [concat(x, cast(id as string)) DESC NULLS LAST], true
                       +- Range (0, 40, step=1, splits=Some(4))
    """)


def test_rows_that_an_offset_drops_are_numbered_below(tables: FakeModel) -> None:
    only(tables.spark, "limitBeforeCalls")
    assert text(tables.spark.sql(f"SELECT id, r FROM {SUBQUERY} ORDER BY id OFFSET 3")) == golden("""
        Sort [id ASC NULLS FIRST], true
        +- Project [id, pythonUDF0 AS r]
           +- ArrowEvalPython [llm(spec, p, concat(x, cast(id as string)))], [pythonUDF0], 204
              +- Project [id]
                 +- Filter (row_number > 3)
                    +- Window [row_number() windowspecdefinition(id ASC NULLS FIRST, specifiedwindowframe(RowFrame, \
unboundedpreceding$(), currentrow$())) AS row_number], [id ASC NULLS FIRST]
                       +- Range (0, 40, step=1, splits=Some(4))
    """)


def test_few_rows_stay_as_they_come_and_many_may_be_placed(tables: FakeModel) -> None:
    only(tables.spark, *WITH)
    limited = tables.spark.sql(f"SELECT count(r) FROM (SELECT {CALL} AS r FROM t LIMIT 20)")
    assert [plan.order_why for plan in rows(limited)] == ["as they come: below a LIMIT"]
    tables.spark.conf.set("spark.llm.windowRows", "10")
    limited = tables.spark.sql(f"SELECT count(r) FROM (SELECT {CALL} AS r FROM t LIMIT 20)")
    assert "LIMIT" not in rows(limited)[0].order_why


def test_a_limit_stops_at_filters_and_at_answers_drawn_without_a_seed(tables: FakeModel) -> None:
    only(tables.spark, "limitBeforeCalls")
    limited = text(tables.spark.sql(f"SELECT id, llm('q', text) AS s FROM t WHERE {CALL} > '4' ORDER BY id LIMIT 3"))
    lines = [line.strip(" +-") for line in limited.splitlines()]
    names = [line.split(" ")[0] for line in lines if not line.startswith("Project")]
    assert names == ["ArrowEvalPython", "GlobalLimit", "LocalLimit", "Sort", "Filter", "ArrowEvalPython", "Range"]
    drawn = text(tables.spark.sql("SELECT id, llm('p', text, temperature => 1) AS s FROM t ORDER BY id LIMIT 3"))
    assert drawn.startswith("GlobalLimit")


def test_the_root_limit_stays_over_a_table_with_rows_to_spare(tables: FakeModel) -> None:
    only(tables.spark, "limitBeforeCalls")
    large = "(SELECT id, concat('x', id) AS text FROM range(0, 10000, 1, 4))"
    at_root = text(tables.spark.sql(f"SELECT id, {CALL} AS r FROM {large} LIMIT 3"))
    assert at_root.startswith("GlobalLimit")
    inside = text(tables.spark.sql(f"SELECT count(r) FROM (SELECT {CALL} AS r FROM {large} LIMIT 3)"))
    assert inside.index("ArrowEvalPython") < inside.index("GlobalLimit")


def test_rows_that_come_in_order_are_not_gathered(tables: FakeModel) -> None:
    only(tables.spark, "limitBeforeCalls")
    tables.spark.sql("SELECT * FROM t ORDER BY id DESC").cache().createOrReplaceTempView("ordered")
    limited = tables.spark.sql(f"SELECT id, {CALL} AS r FROM ordered LIMIT 3")
    assert text(limited).startswith("GlobalLimit")
    assert [row.id for row in limited.collect()] == [39, 38, 37]
    tables.spark.catalog.uncacheTable("ordered")


def test_show_head_and_take(tables: FakeModel) -> None:
    only(tables.spark, *WITH)
    df = tables.spark.sql(f"SELECT id, {CALL} AS r FROM t")
    for act in (lambda: df.show(12), lambda: df.take(13), lambda: df.head(13)):
        tables.forget()
        act()
        assert len(tables.requests()) == 13  # show() looks whether there is one more
