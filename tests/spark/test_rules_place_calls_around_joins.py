"""PlaceCallsAroundJoins: where calls stand in the plan, and how many calls and rows that makes."""

from __future__ import annotations

import pytest
from fake_counting import FakeModel
from plans import context, golden, optimized, planner, settings, spark_jobs, text
from pyspark.sql import DataFrame, SparkSession

from spark_llm.optimizer.catalyst.notes import Note
from spark_llm.optimizer.rules.place_calls_around_joins import place_calls_around_joins
from spark_llm.report import last_report, reports

pytestmark = pytest.mark.spark

RULE = "placeCallsAroundJoins"
OTHERS = (
    "reuseAnswers",
    "limitBeforeCalls",
    "aggregateDistinct",
    "placeInstruction",
    "reorderColumns",
    "orderLlmPredicates",
    "fuseCalls",
    "reorderRows",
    "shuffleBelowSort",
)


def views(spark: SparkSession) -> None:
    """facts: 40 rows of weeks 0 to 9, of products 0 to 3; products: 8, and a ninth whose key is NULL; weeks: 10; few:
    the 4 products of the facts; marked: product 3 and NULL. Jobs for statistics may take long on a busy machine."""
    settings(spark, statistics_timeout="120s", **{f"{name}_enabled": False for name in OTHERS})
    spark.sql(
        "SELECT int(id) AS fact, int(id % 4) AS k, int(id % 10) AS week FROM range(0, 40, 1, 2)"
    ).createOrReplaceTempView("facts")
    spark.sql(
        "SELECT int(id) AS k, concat('product ', id) AS name FROM range(0, 8, 1, 2) UNION ALL SELECT NULL, 'lost'"
    ).createOrReplaceTempView("products")
    spark.sql("SELECT k, name FROM products WHERE k < 4").createOrReplaceTempView("few")
    spark.sql("SELECT int(id) AS week, id < 1 AS is_first FROM range(0, 10, 1, 1)").createOrReplaceTempView("weeks")
    spark.sql("SELECT * FROM VALUES (3), (CAST(NULL AS INT)) AS v(k)").createOrReplaceTempView("marked")


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    views(echo)
    return echo


def notes(spark: SparkSession, df: DataFrame) -> list[Note]:
    """What the rule says of the query."""
    with planner(spark).noting() as found:
        optimized(df)
    return [note for note in found.all() if note.rule == RULE]


def assert_settled(df: DataFrame) -> None:
    plan = optimized(df)
    assert place_calls_around_joins(plan, context(df.sparkSession)).fastEquals(plan)


def test_a_filtered_dimension_is_asked_above_the_join(t: SparkSession) -> None:
    df = t.sql("SELECT fact, p.k FROM facts f JOIN products p ON f.k = p.k WHERE week = 7 AND llm('p', name) > 'x'")
    plan = text(df)
    assert plan.index("Filter (pythonUDF0 > x)") < plan.index("ArrowEvalPython") < plan.index("Join Inner, (k = k)")
    assert_settled(df)


def test_golden_above(t: SparkSession) -> None:
    t.createDataFrame([(1, "a"), (2, "b"), (3, "b")], "k INT, name STRING").createOrReplaceTempView("d")
    t.createDataFrame([(1,), (1,)], "k INT").createOrReplaceTempView("f")
    df = t.sql("SELECT f.k FROM f JOIN d ON f.k = d.k WHERE llm('p', name) = 'x'")
    assert text(df) == golden("""
        Project [k]
        +- Project [k, k]
           +- Filter (pythonUDF0 = x)
              +- ArrowEvalPython [llm(spec, p, name)], [pythonUDF0], 204
                 +- Join Inner, (k = k)
                    :- Filter isnotnull(k)
                    :  +- LogicalRDD
                    +- Filter isnotnull(k)
                       +- LogicalRDD
    """)
    assert_settled(df)


def test_golden_below(t: SparkSession) -> None:
    t.createDataFrame([(1, "a"), (2, "b")], "k INT, name STRING").createOrReplaceTempView("d")
    t.createDataFrame([(1,), (1,), (2,)], "k INT").createOrReplaceTempView("f")
    df = t.sql("SELECT f.k, llm('p', name) AS r FROM f JOIN d ON f.k = d.k")
    assert text(df) == golden("""
        Project [k, pythonUDF0 AS r]
        +- Project [k, name, pythonUDF0]
           +- Join Inner, (k = k)
              :- Filter isnotnull(k)
              :  +- LogicalRDD
              +- ArrowEvalPython [llm(spec, p, name)], [pythonUDF0], 204
                 +- Filter isnotnull(k)
                    +- LogicalRDD
    """)
    assert_settled(df)


R = "(SELECT *, llm('p', name) AS r FROM {})"
PRODUCTS, FEW = R.format("products"), R.format("few")
# query, calls, rows that the UDF gets
CASES = {
    "a dimension's column in SELECT": ("SELECT fact, llm('p', name) FROM facts JOIN few USING (k)", 4, 4),
    "of which the facts have half": ("SELECT fact, llm('p', name) FROM facts JOIN products USING (k)", 4, 40),
    "in WHERE over few facts": (
        "SELECT fact FROM facts JOIN products USING (k) WHERE week = 7 AND llm('p', name) > '0'",
        2,
        4,
    ),
    "in WHERE and in SELECT, of a join that drops nothing": (
        f"SELECT fact, r FROM facts JOIN {FEW} USING (k) WHERE r > '0'",
        4,
        8,
    ),
    "a semi join": (f"SELECT k, r FROM {PRODUCTS} LEFT SEMI JOIN (SELECT * FROM facts WHERE week = 7) USING (k)", 2, 2),
    "EXISTS and a filter": (
        "SELECT k FROM products p WHERE llm('p', name) > '0' AND EXISTS (SELECT 1 FROM facts f WHERE f.k = p.k)",
        4,
        4,
    ),
    "an anti join": (f"SELECT k, r FROM {PRODUCTS} LEFT ANTI JOIN facts USING (k)", 5, 5),
    "an anti join and a filter": (
        f"SELECT k FROM {PRODUCTS} p WHERE r > '0' AND NOT EXISTS (SELECT 1 FROM facts f WHERE f.k = p.k)",
        5,
        5,
    ),
    "NOT IN with a NULL": (f"SELECT k FROM {PRODUCTS} WHERE r > '0' AND k NOT IN (SELECT k FROM marked)", 0, 0),
    "the preserved side of a left join that repeats it": (
        "SELECT p.k, fact, llm('p', name) FROM products p LEFT JOIN facts f ON p.k = f.k",
        9,
        9,
    ),
    "the preserved side of a right join": (
        "SELECT p.k, fact, llm('p', name) FROM facts f RIGHT JOIN products p ON p.k = f.k",
        9,
        9,
    ),
    "the other side of a left join": (
        "SELECT fact, llm('p', name) FROM facts f LEFT JOIN products p ON f.k = p.k AND p.k < 2",
        2,
        40,
    ),
    "a call below the other side of a left join": (f"SELECT fact, r FROM facts LEFT JOIN {PRODUCTS} USING (k)", 8, 8),
    "a full join": (f"SELECT fact, r FROM facts FULL JOIN {PRODUCTS} USING (k)", 9, 9),
    "a cross join": ("SELECT fact, llm('p', name) FROM facts CROSS JOIN few", 4, 4),
    "a join on the answer": (f"SELECT fact FROM facts f JOIN {FEW} p ON f.k = length(p.r)", 4, 8),
    "a join on something else than an equality": (
        f"SELECT fact, r FROM facts f JOIN {PRODUCTS} p ON f.k > p.k AND f.week = 7",
        3,
        8,
    ),
    "duplicates and a NULL": (
        "SELECT k, llm('p', name) FROM (SELECT k, if(k % 2 = 0, 'even', NULL) AS name FROM few) JOIN facts USING (k)",
        1,
        4,
    ),
    "past a join that repeats to one that drops": (
        f"SELECT fact, r FROM {PRODUCTS} p JOIN facts f USING (k) JOIN weeks w USING (week) WHERE is_first",
        2,
        4,
    ),
    "down past two joins": (
        "SELECT fact, llm('p', name) FROM few JOIN facts USING (k) JOIN weeks USING (week)",
        4,
        4,
    ),
    "columns of both sides": ("SELECT llm('p', name, week) FROM few JOIN facts USING (k)", 20, 40),
    "both sides of a self join": (
        f"SELECT a.r, b.r FROM {FEW} a JOIN {FEW} b ON a.k = b.k + 1",
        4,
        6,
    ),
}


@pytest.mark.parametrize(("query", "calls", "rows"), CASES.values(), ids=list(CASES))
def test_calls_and_rows(model: FakeModel, query: str, calls: int, rows: int) -> None:
    spark = model.spark
    views(spark)
    df = spark.sql(query)
    before = len(reports(spark))
    found = sorted(map(str, df.collect()))
    assert model.engine_calls() == calls
    report = last_report(spark) if len(reports(spark)) > before else None
    assert (report.rows if report is not None else 0) == rows
    settings(spark, enabled=False)
    assert sorted(map(str, spark.sql(query).collect())) == found
    settings(spark, enabled=True)
    assert_settled(df)


def test_a_call_drawn_without_a_seed_stays(t: SparkSession) -> None:
    df = t.sql(
        "SELECT fact, r FROM facts JOIN (SELECT *, llm('p', name, temperature => 0.5) AS r FROM products) USING (k)"
    )
    settings(t, placeCallsAroundJoins_enabled=False)
    before = text(
        t.sql(
            "SELECT fact, r FROM facts JOIN (SELECT *, llm('p', name, temperature => 0.5) AS r FROM products) USING (k)"
        )
    )
    assert text(df) == before


def test_where_nothing_is_counted_a_filter_on_the_other_side_decides(t: SparkSession) -> None:
    settings(t, statistics_enabled=False)
    filtered = f"SELECT fact, r FROM facts JOIN {PRODUCTS} USING (k) WHERE week = 7"
    assert [each.fired for each in notes(t, t.sql(filtered))] == [True]
    assert text(t.sql(filtered)).index("ArrowEvalPython") < text(t.sql(filtered)).index("Join Inner")
    assert_settled(t.sql(filtered))
    whole = f"SELECT fact, r FROM facts JOIN {FEW} USING (k)"
    assert [each.fired for each in notes(t, t.sql(whole.replace("few", "products")))] == [False]
    semi = "SELECT k FROM few p WHERE llm('p', name) > '0' AND EXISTS (SELECT 1 FROM facts f WHERE f.k = p.k)"
    assert any(each.fired for each in notes(t, t.sql(semi)))


def test_an_explained_plan_runs_no_job(t: SparkSession) -> None:
    t.range(3).selectExpr("int(id) AS k", "id AS v").createOrReplaceTempView("new")
    jobs = spark_jobs(t)
    t.sql("EXPLAIN SELECT v, r FROM new JOIN (SELECT *, llm('p', name) AS r FROM products) USING (k)").collect()
    assert spark_jobs(t) == jobs


def test_the_catalogs_statistics_decide(t: SparkSession) -> None:
    """With ANALYZE TABLE and Spark's cost-based optimizer no job is needed."""
    settings(t, statistics_enabled=False)
    t.conf.set("spark.sql.cbo.enabled", "true")
    t.sql("CREATE TABLE placed_facts USING parquet AS SELECT k, week FROM facts")
    t.sql("CREATE TABLE placed_products USING parquet AS SELECT k, name FROM few")
    try:
        for table in ("placed_facts", "placed_products"):
            t.sql(f"ANALYZE TABLE {table} COMPUTE STATISTICS FOR ALL COLUMNS")
        df = t.sql("SELECT week, llm('p', name) AS r FROM placed_facts JOIN placed_products USING (k)")
        found = notes(t, df)
        assert [each.why for each in found if each.fired] == [
            "below the join: 4 calls in 4 rows instead of 4 calls in 40 rows by the catalog's statistics"
        ]
    finally:
        t.sql("DROP TABLE placed_facts")
        t.sql("DROP TABLE placed_products")


def test_the_numbers_are_noted(t: SparkSession) -> None:
    df = t.sql(f"SELECT fact, r FROM facts JOIN {PRODUCTS} USING (k) WHERE week = 7")
    first = notes(t, df)[0]
    assert first.fired
    assert first.why == "above the join (Inner): 2 calls in 4 rows instead of 8 calls in 8 rows"
