"""The UDF inside real Spark tasks, with a fake engine: rows, batches, reports, and how queries end."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import pytest
from fake_engine import fake_udf
from pyspark.errors import PythonException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_llm import progress
from spark_llm.call import CallSpec, FieldSpec, RowPlan
from spark_llm.report import Report, install, last_report, reports

pytestmark = pytest.mark.spark

Ask = Callable[..., Column]


@pytest.fixture(scope="module")
def ask(spark: SparkSession) -> Ask:
    """ask("prompt", "column", ...) is a call with these fields and a fake engine behind it."""
    udf = fake_udf(install(spark).sink)

    def ask(prompt: str | Column, *fields: str, **options: object) -> Column:
        options.setdefault("rows", RowPlan(fold=True))
        spec = CallSpec(fields=tuple(FieldSpec(name) for name in fields), **options)  # type: ignore[arg-type]
        text = F.lit(prompt) if isinstance(prompt, str) else prompt
        return udf(F.lit(spec.encode()), text, *(F.col(name).cast("string") for name in fields))

    return ask


@pytest.fixture(autouse=True)
def conf(spark: SparkSession) -> Iterator[Callable[[str, object], None]]:
    """Sets spark.llm.* and Spark's keys for one test."""
    changed: list[str] = []

    def set_conf(key: str, value: object) -> None:
        changed.append(key)
        spark.conf.set(key, str(value))

    set_conf("spark.llm.windowRows", 8)
    yield set_conf
    for key in changed:
        spark.conf.unset(key)


def numbers(spark: SparkSession, rows: int, partitions: int = 2) -> DataFrame:
    return spark.range(0, rows, 1, partitions)


def report_of(spark: SparkSession) -> Report:
    report = last_report(spark)
    assert report is not None
    return report


@pytest.mark.parametrize("records", [1, 3, 10_000])
def test_rows_keep_their_order_and_values(
    spark: SparkSession, ask: Ask, conf: Callable[[str, object], None], records: int
) -> None:
    conf("spark.sql.execution.arrow.maxRecordsPerBatch", records)
    rows = numbers(spark, 50, 3).select("id", ask("p", "id").alias("a")).collect()
    assert [(row.id, row.a) for row in rows] == [(n, f'p\nid: "{n}"\n') for n in range(50)]
    report = report_of(spark)
    assert (report.rows, report.calls, report.duplicates, report.nulls, report.failed) == (50, 50, 0, 0, 0)
    assert report.prompt_tokens == sum(len(row.a) for row in rows)
    assert report.cached_tokens == 250
    assert report.cached_tokens + report.computed_tokens == report.prompt_tokens
    assert (report.instruction_tokens, report.output_tokens) == (100, 150)
    assert report.seconds > 0
    assert set(report.by_call) == {"p"}


def test_nulls_duplicates_and_failures(spark: SparkSession, ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    table = spark.createDataFrame(
        [("p", "a"), ("p", "a"), (None, "a"), ("p", None), ("fail", "x")], "p string, v string"
    ).coalesce(1)
    with caplog.at_level(logging.WARNING, "spark_llm"):
        rows = table.select(ask(F.col("p"), "v").alias("a")).collect()
    answer = "p\nv: a\n"
    assert [row.a for row in rows] == [answer, answer, None, None, None]
    report = report_of(spark)
    assert (report.rows, report.calls, report.duplicates, report.nulls, report.failed) == (5, 1, 1, 2, 1)
    assert report.errors == ("[LLM_FAKE] this row fails SQLSTATE: 22000",)
    assert "[LLM_FAKE]" in caplog.text


def test_a_failed_row_can_fail_the_query(spark: SparkSession, ask: Ask, conf: Callable[[str, object], None]) -> None:
    conf("spark.llm.onError", "fail")
    with pytest.raises(PythonException, match=r"\[LLM_ROW_FAILED\].*\[LLM_FAKE\]"):
        numbers(spark, 3).select(ask("fail", "id")).collect()
    assert report_of(spark).failed > 0


def test_empty_partitions_and_empty_tables(spark: SparkSession, ask: Ask) -> None:
    before = len(reports(spark))
    assert numbers(spark, 0).select(ask("p", "id")).collect() == []
    assert len(reports(spark)) == before
    assert len(numbers(spark, 3, 8).select(ask("p", "id")).collect()) == 3


def test_a_prompt_alone(spark: SparkSession, ask: Ask) -> None:
    rows = numbers(spark, 3).select(ask(F.concat(F.lit("say "), F.col("id"))).alias("a")).collect()
    assert [row.a for row in rows] == ["say 0", "say 1", "say 2"]
    assert sum(part.rows for part in report_of(spark).by_call.values()) == 3


def test_naive_mode(spark: SparkSession, ask: Ask, conf: Callable[[str, object], None]) -> None:
    for key, value in [("windowRows", 1), ("windowsInFlight", 1), ("engine.prefixCache", "false")]:
        conf(f"spark.llm.{key}", value)
    rows = numbers(spark, 10).select(ask("p", rows=None).alias("a")).collect()
    assert [row.a for row in rows] == ["p"] * 10
    assert (report_of(spark).calls, report_of(spark).duplicates) == (10, 0)


def test_sampling_without_a_seed_never_folds(spark: SparkSession, ask: Ask) -> None:
    for options, calls in [({"temperature": 0.5}, 6), ({"temperature": 0.5, "seed": 1}, 1), ({"seed": 1}, 1)]:
        numbers(spark, 6, 1).select(ask("p", **options)).collect()
        assert report_of(spark).calls == calls, options


def test_two_calls_are_one_report_with_a_break_down(spark: SparkSession, ask: Ask) -> None:
    numbers(spark, 6).select(ask("p", "id"), ask("quite long", "id")).collect()
    report = report_of(spark)
    assert (report.rows, report.calls) == (12, 12)
    assert {prompt: part.rows for prompt, part in report.by_call.items()} == {"p": 6, "quite long": 6}


@pytest.mark.parametrize("rows", [1, 3])
def test_reports_of_queries_that_spark_ends_early(spark: SparkSession, ask: Ask, rows: int) -> None:
    """Spark drops the accumulators of such tasks; the back-channel does not."""
    table = numbers(spark, 40).repartition(2)
    assert len(table.select(ask("p", "id")).limit(rows).collect()) == rows
    assert report_of(spark).rows >= rows
    assert report_of(spark).calls >= rows
    table.select(ask("p", "id")).show(rows)
    assert report_of(spark).calls >= rows
    assert len(reports(spark)) >= 2


def test_an_early_end_reaches_a_worker_that_waits_for_its_engine(spark: SparkSession, ask: Ask) -> None:
    """The first window's rows reach Spark although the second never ends, and then the worker goes."""
    table = numbers(spark, 200, 1).selectExpr("if(id < 8, string(id), concat('never', id)) AS v")
    found = table.select(ask("p", "v").alias("a")).where("a like '%1%'").limit(1).collect()
    assert [row.a for row in found] == ['p\nv: "1"\n']
    tally = install(spark).tally
    with tally.changed:
        assert tally.changed.wait_for(lambda: not tally.working(), 30)


def test_workers_are_usable_after_early_ends(
    spark: SparkSession, ask: Ask, conf: Callable[[str, object], None]
) -> None:
    conf("spark.sql.execution.arrow.maxRecordsPerBatch", 1)
    for _ in range(3):
        answer = ask("p", "id").alias("a")
        found = numbers(spark, 200).select(answer).where("a like '%1%'").limit(2).collect()
        assert len(found) == 2


def test_a_large_partition_with_few_distinct_rows(
    spark: SparkSession, ask: Ask, conf: Callable[[str, object], None]
) -> None:
    conf("spark.llm.windowRows", 4096)
    table = numbers(spark, 100_000, 1).select((F.col("id") % 7).alias("k"))
    counts = {row.a: row["count"] for row in table.select(ask("p", "k").alias("a")).groupBy("a").count().collect()}
    assert len(counts) == 7
    assert sum(counts.values()) == 100_000
    assert (report_of(spark).calls, report_of(spark).duplicates) == (7, 99_993)


def test_without_the_back_channel_the_accumulator_counts(spark: SparkSession) -> None:
    sink = install(spark).sink._replace(address=None)
    udf = fake_udf(sink)
    numbers(spark, 20).select(udf(F.lit(CallSpec(rows=RowPlan(fold=True)).encode()), F.lit("p"))).collect()
    assert (report_of(spark).rows, report_of(spark).calls, report_of(spark).duplicates) == (20, 2, 18)


def test_work_outside_a_sql_query_is_reported_by_stage(spark: SparkSession, ask: Ask) -> None:
    assert numbers(spark, 4).select(ask("p", "id").alias("a")).rdd.count() == 4
    assert report_of(spark).query.startswith("stage-")
    assert report_of(spark).rows == 4


def test_the_progress_line_of_a_real_query(spark: SparkSession, ask: Ask) -> None:
    out = io.StringIO()
    with progress.shown(spark, out):
        numbers(spark, 2000).select(ask("p", "id")).collect()
    assert out.getvalue().startswith(f"llm query {report_of(spark).query}: ")


def test_install_is_once_per_context_and_shared_by_sessions(spark: SparkSession) -> None:
    assert install(spark) is install(spark) is install(spark.newSession())
