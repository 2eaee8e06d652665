"""AggregateDistinct: what is grouped below a call, the rows and calls that leaves, and that results stay equal."""

from __future__ import annotations

from decimal import Decimal

import pytest
from fake_counting import FakeModel
from hypothesis import HealthCheck, Phase, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from plans import context, golden, optimized, planner, settings, text
from pyspark.sql import DataFrame, SparkSession

from spark_llm.optimizer.catalyst.notes import Note
from spark_llm.optimizer.rules.aggregate_distinct import aggregate_distinct
from spark_llm.report import last_report, reports

pytestmark = pytest.mark.spark

RULE = "aggregateDistinct"
OTHERS = (
    "reuseAnswers",
    "limitBeforeCalls",
    "placeCallsAroundJoins",
    "placeInstruction",
    "reorderColumns",
    "orderLlmPredicates",
    "fuseCalls",
    "reorderRows",
    "shuffleBelowSort",
)


def view(spark: SparkSession) -> None:
    """t: 40 rows, k of 4 values, kind of 4 and NULL, numbers of several types. Jobs for statistics may take long on a
    busy machine."""
    settings(spark, statistics_timeout="120s", **{f"{name}_enabled": False for name in OTHERS})
    spark.sql(
        "SELECT int(id) AS id, int(id % 4) AS k, if(id % 5 = 0, NULL, concat('kind ', id % 5)) AS kind,"
        " if(id % 3 = 0, NULL, int(id)) AS maybe, cast(id / 8 AS DECIMAL(8, 3)) AS price, id * 0.1D AS double"
        " FROM range(0, 40, 1, 2)"
    ).createOrReplaceTempView("t")


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    view(echo)
    return echo


def assert_settled(df: DataFrame) -> None:
    plan = optimized(df)
    assert aggregate_distinct(plan, context(df.sparkSession)).fastEquals(plan)


def notes(spark: SparkSession, df: DataFrame) -> list[Note]:
    """What the rule says of the query."""
    with planner(spark).noting() as found:
        optimized(df)
    return [each for each in found.all() if each.rule == RULE]


def make_local(spark: SparkSession) -> None:
    rows = [("a", 1, 1), ("a", 2, None), ("b", 1, 3), ("a", 1, 1)]
    spark.createDataFrame(rows, "text STRING, k INT, n INT").createOrReplaceTempView("l")


def test_golden_group_by(t: SparkSession) -> None:
    make_local(t)
    df = t.sql("SELECT llm('p', text) AS r, count(*) AS c, sum(n) AS s FROM l GROUP BY 1")
    assert text(df) == golden("""
        Aggregate [_groupingexpression], [_groupingexpression AS r, coalesce(sum(_llm_n), 0) AS c, sum(_llm_p1) AS s]
        +- Project [pythonUDF0 AS _groupingexpression, _llm_n, _llm_p1]
           +- ArrowEvalPython [llm(spec, p, text)], [pythonUDF0], 204
              +- Aggregate [text], [text, count(1) AS _llm_n, sum(n) AS _llm_p1]
                 +- Project [text, n]
                    +- LogicalRDD
    """)
    assert_settled(df)


def test_golden_distinct(t: SparkSession) -> None:
    make_local(t)
    df = t.sql("SELECT DISTINCT llm('p', text, k) AS r FROM l")
    assert text(df) == golden("""
        Aggregate [r], [r]
        +- Project [pythonUDF0 AS r]
           +- ArrowEvalPython [llm(spec, p, text, _llm1)], [pythonUDF0], 204
              +- Aggregate [text, _llm1], [text, _llm1]
                 +- Project [text, cast(k as string) AS _llm1]
                    +- Project [text, k]
                       +- LogicalRDD
    """)
    assert_settled(df)


def test_golden_count_over_a_filter(t: SparkSession) -> None:
    make_local(t)
    df = t.sql("SELECT k, count(*) AS c FROM l WHERE llm('p', text) = 'x' GROUP BY k")
    assert text(df) == golden("""
        Aggregate [k], [k, coalesce(sum(_llm_n), 0) AS c]
        +- Filter (pythonUDF0 = x)
           +- ArrowEvalPython [llm(spec, p, text)], [pythonUDF0], 204
              +- Aggregate [k, text], [k, text, count(1) AS _llm_n]
                 +- Project [text, k]
                    +- LogicalRDD
    """)
    assert_settled(df)


def test_golden_union(t: SparkSession) -> None:
    make_local(t)
    df = t.sql("SELECT k, llm('p', text) AS r FROM l UNION ALL SELECT n, llm('p', text) FROM l WHERE k > 1")
    assert text(df) == golden("""
        Project [k, pythonUDF0 AS r]
        +- ArrowEvalPython [llm(spec, p, _llm1)], [pythonUDF0], 204
           +- Union false, false
              :- Project [k, text AS _llm1]
              :  +- Project [text, k]
              :     +- LogicalRDD
              +- Project [n, text AS _llm1]
                 +- Project [text, n]
                    +- Filter (isnotnull(k) AND (k > 1))
                       +- LogicalRDD
    """)
    assert_settled(df)


def test_a_union_of_qualified_columns(t: SparkSession) -> None:
    make_local(t)
    df = t.sql("SELECT n, llm('p') AS r FROM l UNION ALL SELECT id, llm('p') FROM t")
    assert text(df) == golden("""
        Project [n, pythonUDF0 AS r]
        +- ArrowEvalPython [llm(spec, p)], [pythonUDF0], 204
           +- Union false, false
              :- Project [n]
              :  +- Project [n]
              :     +- LogicalRDD
              +- Project [cast(id as int) AS id]
                 +- Range (0, 40, step=1, splits=Some(2))
    """)
    assert_settled(df)


KIND = "llm('p', kind)"
# query, calls, rows that the UDF gets
CASES = {
    "GROUP BY the answer": (f"SELECT {KIND} AS r, count(*), count(maybe), sum(id), max(id) FROM t GROUP BY 1", 4, 5),
    "GROUP BY another column": (f"SELECT k, max({KIND}), count(DISTINCT {KIND}) FROM t GROUP BY k", 4, 20),
    "DISTINCT": (f"SELECT DISTINCT {KIND} FROM t", 4, 5),
    "count of distinct answers": (f"SELECT count(DISTINCT {KIND}) FROM t", 4, 5),
    "count of answers": (f"SELECT count({KIND}) FROM t", 4, 5),
    "count over a filter": (f"SELECT count(*) FROM t WHERE {KIND} > '5'", 4, 5),
    "count over no rows": (f"SELECT count(*), count(id), sum(id), avg(id) FROM t WHERE {KIND} = 'nothing'", 4, 5),
    "FILTER on the answer": (f"SELECT count(*) FILTER (WHERE {KIND} > '5'), sum(id) FROM t", 4, 5),
    "FILTER on another column": (f"SELECT {KIND} AS r, count(*) FILTER (WHERE id > 9) FROM t GROUP BY 1", 4, 5),
    "FILTER on both": (f"SELECT count(*) FILTER (WHERE {KIND} > '5' AND k > 0), count(id) FROM t", 4, 20),
    "sums over answers": (
        f"SELECT sum(length({KIND})), avg(length({KIND})), sum(if({KIND} > '5', 1, 0)) FROM t",
        4,
        5,
    ),
    "averages and decimals": (f"SELECT {KIND} AS r, avg(maybe), sum(price), min(double) FROM t GROUP BY 1", 4, 5),
    "HAVING": (f"SELECT {KIND} AS r FROM t GROUP BY 1 HAVING count(*) > 7 AND sum(maybe) > 0", 4, 5),
    "an argument coarser than its column": ("SELECT DISTINCT llm('p', id % 2) FROM t", 2, 2),
    "a prompt that differs by row": ("SELECT llm(kind) AS r, count(*) FROM t GROUP BY 1", 4, 5),
    "two calls": (f"SELECT {KIND} AS r, llm('q', k) AS s, count(*) FROM t GROUP BY 1, 2", 8, 40),
    "a call over the answer of another": (
        "SELECT llm('q', r) AS s, count(*) FROM (SELECT llm('p', k) AS r FROM t) GROUP BY 1",
        8,
        8,
    ),
    "rows that do not repeat": ("SELECT llm('p', id) AS r, count(*) FROM t GROUP BY 1", 40, 40),
    "a sum of doubles": (f"SELECT {KIND} AS r, sum(double) FROM t GROUP BY 1", 4, 40),
    "a list": (f"SELECT {KIND} AS r, sort_array(collect_list(id)) FROM t GROUP BY 1", 4, 40),
    "ROLLUP": (f"SELECT k, {KIND} AS r, count(*) FROM t GROUP BY ROLLUP (k, r)", 4, 40),
    "UNION": (f"SELECT {KIND} AS r FROM t UNION SELECT {KIND} FROM t WHERE k = 1", 4, 5),
    "UNION ALL": (f"SELECT id, {KIND} AS r FROM t UNION ALL SELECT k, {KIND} FROM t WHERE k = 1", 4, 50),
    "count over UNION ALL": (
        f"SELECT r, count(*) FROM (SELECT {KIND} AS r FROM t UNION ALL SELECT {KIND} FROM t WHERE k = 1) GROUP BY r",
        4,
        5,
    ),
    "UNION ALL of what is made of answers": (
        f"SELECT upper({KIND}) AS r FROM t WHERE {KIND} > '5' UNION ALL SELECT upper({KIND}) FROM t WHERE {KIND} > '5'",
        4,
        None,
    ),
    "UNION ALL of calls that differ": (f"SELECT {KIND} AS r FROM t UNION ALL SELECT llm('q', kind) FROM t", 8, 80),
    "UNION ALL with a branch without a call": (f"SELECT {KIND} AS r FROM t UNION ALL SELECT kind FROM t", 4, 40),
    "UNION ALL of what differs above": (
        f"SELECT upper({KIND}) AS r FROM t UNION ALL SELECT lower({KIND}) FROM t",
        4,
        80,
    ),
}


@pytest.mark.parametrize(("query", "calls", "rows"), CASES.values(), ids=list(CASES))
def test_calls_and_rows(model: FakeModel, query: str, calls: int, rows: int | None) -> None:
    spark = model.spark
    view(spark)
    df = spark.sql(query)
    before = len(reports(spark))
    found = sorted(map(str, df.collect()))
    assert len(reports(spark)) == before + 1
    assert model.engine_calls() == calls
    if rows is not None and (report := last_report(spark)) is not None:
        assert report.rows == rows
    assert_settled(df)
    settings(spark, enabled=False)
    assert sorted(map(str, spark.sql(query).collect())) == found


def test_draws_without_a_seed_are_left_alone(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', kind, temperature => 0.5) AS r, count(*) FROM t GROUP BY 1")
    assert [(each.fired, each.why) for each in notes(t, df)] == [
        (False, "answers are drawn without a seed: each row has its own")
    ]


def test_why_is_noted(t: SparkSession) -> None:
    def why(query: str) -> str:
        return notes(t, t.sql(query))[0].why

    assert why(f"SELECT DISTINCT {KIND} FROM t") == "distinct inputs are counted below the call: 5 in 40 rows"
    assert why("SELECT DISTINCT llm('p', id) FROM t").startswith("rows below the call hardly repeat: 40 in 40 rows")
    assert why(f"SELECT {KIND} AS r, sum(double) FROM t GROUP BY 1").startswith("sum() may come out otherwise")


def test_a_setting_switches_it_off(t: SparkSession) -> None:
    settings(t, aggregateDistinct_enabled=False)
    assert "_llm" not in text(t.sql(f"SELECT {KIND} AS r, count(*) FROM t GROUP BY 1"))


FUNCTIONS = (
    "count(*)",
    "count(n)",
    "count(r)",
    "count(r, n)",
    "count(DISTINCT n)",
    "count(*) FILTER (WHERE r > '8')",
    "count(n) FILTER (WHERE n > 0)",
    "sum(n)",
    "sum(n) FILTER (WHERE r > '8')",
    "sum(n) FILTER (WHERE n > 0)",
    "sum(length(r) + n)",
    "sum(d)",
    "avg(n)",
    "avg(length(r) * n)",
    "avg(n) FILTER (WHERE r > '8')",
    "min(r)",
    "max(n)",
    "max(d)",
    "bool_or(r > '8')",
)
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["x", "y", "", None]),
        st.sampled_from([-1, 0, 7, None]),
        st.sampled_from([Decimal("0.5"), Decimal("-3.25"), None]),
    ),
    max_size=12,
)


@pytest.mark.slow
@hypothesis_settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # an example takes seconds: what fails is not made smaller
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=ROWS,
    functions=st.lists(st.sampled_from(FUNCTIONS), min_size=1, max_size=5, unique=True),
    keys=st.sampled_from(["", "r", "n", "r, n", "a", "upper(r)"]),
    condition=st.sampled_from(["", " WHERE r > '8'", " WHERE r > '8' OR n = 0"]),
    ansi=st.booleans(),
)
def test_results_and_types_stay_the_same(
    model: FakeModel,
    rows: list[tuple[str | None, int | None, Decimal | None]],
    functions: list[str],
    keys: str,
    condition: str,
    ansi: bool,
) -> None:
    spark = model.spark
    settings(spark, statistics_enabled=False, **{f"{name}_enabled": False for name in OTHERS})
    spark.conf.set("spark.sql.ansi.enabled", str(ansi).lower())
    spark.createDataFrame(rows, "a STRING, n INT, d DECIMAL(9, 2)").createOrReplaceTempView("random")
    entries = ", ".join([*([keys] if keys else []), *functions, "max(r)"])
    query = f"SELECT {entries} FROM (SELECT *, llm('p', a) AS r FROM random){condition}"
    query += f" GROUP BY {keys}" if keys else ""
    note(query)
    settings(spark, enabled=True)
    df = spark.sql(query)
    on = df.collect()
    assert any(each.fired for each in notes(spark, spark.sql(query)))
    settings(spark, enabled=False)
    off = spark.sql(query)
    assert sorted(map(str, on)) == sorted(map(str, off.collect()))
    executed = [each._jdf.queryExecution().executedPlan().schema().json() for each in (df, off)]
    assert executed[0] == executed[1]
