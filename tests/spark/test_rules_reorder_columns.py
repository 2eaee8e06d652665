"""ReorderColumns: which order it gives fields and why, when it leaves a call alone, and that prompts follow it."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent, golden, orders, prompts, rows, settings, text
from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


def tables(spark: SparkSession) -> None:
    """films: 20 rows; reviews: 200 rows, 10 for each film, whose quotes are unique."""
    spark.range(0, 20, 1, 1).selectExpr(
        "id AS film", "concat('title ', id) AS title", "repeat(concat('plot ', id, ' '), 20) AS plot"
    ).createOrReplaceTempView("films")
    spark.range(0, 200, 1, 2).selectExpr(
        "id", "id % 20 AS film", "concat('quote ', id) AS quote", "id % 2 = 0 AS fresh"
    ).createOrReplaceTempView("reviews")


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    tables(echo)
    return echo


JOINED = "reviews JOIN films USING (film)"


def test_the_plan_keeps_its_shape_and_its_arguments(t: SparkSession) -> None:
    settings(t, reorderRows_enabled=False)
    df = t.sql("SELECT llm('p', id, plot => repeat(string(id % 4), 50)) AS a FROM reviews")
    assert text(df) == golden(
        """
        Project [pythonUDF0 AS a]
        +- ArrowEvalPython [llm(spec, p, cast(id as string), repeat(cast((id % 4) as string), 50))], [pythonUDF0], 204
           +- Range (0, 200, step=1, splits=Some(2))
        """
    )
    [plan] = prompts(df)
    assert plan.fields == (1, 0)
    assert plan.table is None
    assert plan.fields_why.startswith("plot, id: ")
    assert "(as written 0%), by 200 rows" in plan.fields_why


def test_fields_that_repeat_stand_first(t: SparkSession) -> None:
    assert orders(t.sql(f"SELECT llm('p', quote, title, plot) FROM {JOINED}")) == [["plot", "title", "quote"]]
    assert orders(t.sql("SELECT llm('p', id, quote, fresh) FROM reviews")) == [["fresh", "id", "quote"]]


def test_the_written_order_stays_where_another_is_no_better(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', id, quote) FROM reviews")
    assert prompts(df)[0].fields == ()
    assert prompts(df)[0].fields_why == "id, quote: as written, 0% of their tokens shared, by 200 rows"
    assert orders(t.sql(f"SELECT llm('p', plot, title, quote) FROM {JOINED}")) == [["plot", "title", "quote"]]


def test_one_row_and_no_row(t: SparkSession) -> None:
    for condition in ("id = 3", "id < 0"):
        [plan] = prompts(t.sql(f"SELECT llm('p', id, quote) FROM reviews WHERE {condition}"))
        assert (plan.fields, plan.table) == ((), None)


def test_heavy_values_get_orders_of_their_own(model: FakeModel) -> None:
    """Half of the rows share their plot, the other half their legal notice."""
    spark = model.spark
    spark.range(0, 2000, 1, 3).selectExpr(
        "concat('item ', id) AS item",
        "if(id % 2 = 0, repeat(concat('plot ', id % 8, ' '), 30), concat('own plot ', id)) AS plot",
        "if(id % 2 = 1, repeat(concat('notice ', id % 8, ' '), 30), concat('own notice ', id)) AS notice",
    ).createOrReplaceTempView("goods")
    df = spark.sql("SELECT llm('p', item, plot, notice) AS a FROM goods")
    [plan] = prompts(df)
    assert plan.table is not None
    assert "groups of rows have orders of their own" in plan.fields_why
    assert rows(df)[0].order_why.endswith("ranges of equal work")
    assert_idempotent(df)
    df.collect()
    assert {request.cells[0][0] for request in model.requests()} == {"plot", "notice"}
    assert all(len(request.cells[0][1]) > 200 for request in model.requests())
    # Rows of a group meet in one task, or in two where a range ends in it.
    where = {(request.cells[0][1], request.stream) for request in model.requests()}
    assert len({value for value, _ in where}) == 8
    assert len(where) <= 8 + rows(df)[0].partitions


def test_prompts_have_the_order_of_the_plan(model: FakeModel) -> None:
    tables(model.spark)
    df = model.spark.sql(f"SELECT llm('p', quote, title, plot) AS a FROM {JOINED}")
    assert len(df.collect()) == 200
    assert len(model.requests()) == 200
    for request in model.requests():
        assert [name for name, _ in request.cells] == ["plot", "title", "quote"]
        assert request.segments[0] == "p\n"


def test_calls_over_the_same_fields_have_the_same_order(t: SparkSession) -> None:
    df = t.sql(f"SELECT llm('p', quote, plot), llm('q', plot, quote) FROM {JOINED} WHERE llm('r', quote, plot) = 'yes'")
    assert orders(df) == [["plot", "quote"]] * 3
    assert_idempotent(df)


def test_calls_over_other_fields_have_their_own(t: SparkSession) -> None:
    df = t.sql(f"SELECT llm('p', quote, plot), llm('q', title, quote) FROM {JOINED}")
    assert sorted(orders(df)) == [["plot", "quote"], ["title", "quote"]]


def test_fields_of_one_name_stay_apart(model: FakeModel) -> None:
    tables(model.spark)
    df = model.spark.sql("SELECT id, llm('p', a => quote, a => film) AS r FROM reviews")
    assert prompts(df)[0].fields == (1, 0)
    df.collect()
    assert {name for request in model.requests() for name, _ in request.cells} == {"a"}
    assert all(request.cells[1][1].startswith("quote") for request in model.requests())


ALONE = {
    "one field": "SELECT llm('p', plot) FROM films",
    "no field": "SELECT llm(plot) FROM films",
    "order => 'as_written'": f"SELECT llm('p', quote, plot, order => 'as_written') FROM {JOINED}",
}


@pytest.mark.parametrize("query", ALONE.values(), ids=list(ALONE))
def test_leaves_alone(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    [plan] = prompts(df)
    assert (plan.fields, plan.table, plan.fields_why) == ((), None, "")
    assert_idempotent(df)


@pytest.mark.parametrize("key", ["mayChangePrompts", "reorderColumns_enabled", "enabled"])
def test_settings_switch_it_off(t: SparkSession, key: str) -> None:
    query = f"SELECT llm('p', quote, plot) FROM {JOINED}"
    assert orders(t.sql(query)) == [["plot", "quote"]]
    settings(t, **{key: False})
    assert orders(t.sql(query)) == [["quote", "plot"]]
    assert prompts(t.sql(query))[0].fields_why == ""


def test_order_auto_is_the_default(t: SparkSession) -> None:
    assert orders(t.sql(f"SELECT llm('p', quote, plot, order => 'auto') FROM {JOINED}")) == [["plot", "quote"]]


def test_a_call_as_written_stands_beside_one_that_is_not(t: SparkSession) -> None:
    df = t.sql(f"SELECT llm('p', quote, plot), llm('q', quote, plot, order => 'as_written') FROM {JOINED}")
    assert sorted(orders(df)) == [["plot", "quote"], ["quote", "plot"]]
    assert_idempotent(df)


THUMB = {
    "the small side of a join": ("quote, title", "reviews JOIN films USING (film)", ["title", "quote"]),
    "written the other way": ("quote, title", "films JOIN reviews USING (film)", ["title", "quote"]),
    "text before numbers": ("number, day, flag, text", "kinds", ["text", "flag", "day", "number"]),
    "columns of one table as written": ("title, plot", "films", ["title", "plot"]),
    "a grouped side": (
        "quote, n",
        "reviews JOIN (SELECT film, max(fresh) AS n FROM reviews GROUP BY film) USING (film)",
        ["n", "quote"],
    ),
}


@pytest.mark.parametrize(("fields", "source", "expected"), THUMB.values(), ids=list(THUMB))
def test_rule_of_thumb(t: SparkSession, fields: str, source: str, expected: list[str]) -> None:
    kinds = "number INT, day DATE, flag BOOLEAN, text STRING"
    t.createDataFrame([(1, datetime.date(2026, 1, 1), True, "x")], kinds).createOrReplaceTempView("kinds")
    settings(t, statistics_enabled=False)
    df = t.sql(f"SELECT llm('p', {fields}) FROM {source}")
    assert orders(df) == [expected]
    assert "by rule of thumb, by the plan alone (spark.llm.optimizer.statistics.enabled is false)" in (
        prompts(df)[0].fields_why
    )
    assert_idempotent(df)


SHORT = "sha2(string(id), 256)"
LONG = "concat_ws('', transform(sequence(1, 32), i -> sha2(string(100 * id + i), 512)))"


@pytest.mark.parametrize("kind", ["JOIN", "LEFT SEMI JOIN"])
def test_pairs_stand_left_row_by_left_row(echo: SparkSession, tmp_path: Path, kind: str) -> None:
    """A table of few long rows and one of many short ones, which has fewer bytes; both are too large for a sample."""
    texts = {"long": (60, f"{LONG} AS body"), "short": (2_500, f"{SHORT} AS name")}
    texts["other"] = (2_400, f"{SHORT} AS other")
    for table, (count, columns) in texts.items():
        echo.range(0, count, 1, 1).selectExpr("id", columns).write.parquet(str(tmp_path / table))
        echo.read.parquet(str(tmp_path / table)).createOrReplaceTempView(table)
    echo.conf.set("spark.llm.join.maxPairs", "10000000")

    def order(left: str, right: str, fields: str) -> tuple[list[str], str]:
        df = echo.sql(f"SELECT * FROM {left} x {kind} {right} y ON llm('p', {fields}) = 'yes'")
        return orders(df)[0], prompts(df)[0].fields_why

    found, why = order("long", "short", "name, body")
    assert found == ["body", "name"]
    assert "the left side of its pairs first: 4,096 bytes a row against 64" in why
    found, why = order("short", "long", "name, body")
    assert found == ["body", "name"]
    assert "the right side of its pairs first, as left rows have 64 bytes a row against 4,096" in why
    found, why = order("short", "other", "other, name")
    assert found == ["name", "other"]
    assert "the left side of its pairs first: 64 bytes a row against 64" in why
    settings(echo, statistics_enabled=False)
    found, why = order("short", "long", "body, name")
    assert found == ["name", "body"]
    assert "the left side of its pairs first" in why


def test_a_subquery_and_its_query_give_equal_arguments_one_prompt(unordered_model: FakeModel) -> None:
    """Spark optimizes subqueries by themselves, and first."""
    spark = unordered_model.spark
    rows = "SELECT concat('text ', id % 5, ' ', repeat('long ', 9)) AS a, concat('item ', id) AS b"
    spark.sql(f"CREATE OR REPLACE TEMP VIEW t AS {rows} FROM range(0, 40, 1, 2)")
    rows = rows.replace("AS a", "AS c").replace("AS b", "AS a").replace("AS c", "AS b")
    spark.sql(f"CREATE OR REPLACE TEMP VIEW u AS {rows} FROM range(0, 40, 1, 2)")
    for query in (
        "SELECT llm('p', a, b) AS x FROM t WHERE b IN (SELECT b FROM u WHERE llm('p', a, b) <> 'no')",
        "SELECT llm('p', a, b) AS x, (SELECT max(llm('p', a, b)) FROM u) AS y FROM t",
    ):
        found = [prompt.fields for prompt in prompts(spark.sql(query))]
        assert len(found) == 2
        assert len(set(found)) == 1
