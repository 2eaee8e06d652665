"""llm() in SQL on the real engine and model: rows, batches and what the reports count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest
from pyspark.errors import PythonException
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

import spark_llm
from spark_llm import Report
from spark_llm.call import CallSpec, FieldSpec, GroupSpec, RowPlan
from spark_llm.report import install
from spark_llm.udf import make_udf

pytestmark = [pytest.mark.spark, pytest.mark.model]

ASK = "llm('What is the capital of this country? Answer with one word.', country, max_tokens => 4)"
COUNTRIES = ("France", "Italy", "Spain", "Peru", "Japan")


@pytest.fixture(scope="module")
def session(spark: SparkSession) -> SparkSession:
    """A session whose engine computes in float32, with a table of 12 countries, two of them NULL."""
    options = {"engine_dtype": "float32", "engine_threads": 1, "cache_enabled": False}
    session = spark_llm.enable(spark.newSession(), **options)
    rows = [(number, COUNTRIES[number % 7] if number % 7 < 5 else None) for number in range(14)]
    session.createDataFrame(rows, "id int, country string").repartition(1).createOrReplaceTempView("places")
    return session


@pytest.fixture(autouse=True)
def configured(session: SparkSession) -> Iterator[None]:
    """Each test starts from the same configuration."""
    yield
    for key in ("windowRows", "windowsInFlight", "optimizer.enabled", "engine.prefixCache", "onError"):
        session.conf.unset(f"spark.llm.{key}")
    session.conf.set("spark.llm.cache.enabled", "false")
    session.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")


def report_of(session: SparkSession) -> Report:
    report = spark_llm.last_report(session)
    assert report is not None
    asked = report.calls + report.duplicates + report.stored + report.failed + report.over_budget
    assert report.rows == asked + report.nulls + report.skipped
    assert report.prompt_tokens == report.cached_tokens + report.computed_tokens
    assert 0 <= report.cached_instruction_tokens <= report.instruction_tokens <= report.prompt_tokens
    return report


def answers(session: SparkSession, source: str = "places") -> dict[int, str | None]:
    return dict(session.sql(f"SELECT id, {ASK} FROM {source}").collect())


@pytest.fixture(scope="module")
def expected(session: SparkSession) -> dict[int, str | None]:
    """The answers in the default configuration."""
    return answers(session)


def test_answers_nulls_and_duplicates(session: SparkSession, expected: dict[int, str | None]) -> None:
    assert expected[0] is not None
    assert "Paris" in expected[0]
    assert answers(session) == expected
    assert [number for number, answer in expected.items() if answer is None] == [5, 6, 12, 13]
    assert all(expected[number] == expected[number + 7] for number in range(7))
    report = report_of(session)
    assert (report.rows, report.calls, report.duplicates, report.nulls, report.failed) == (14, 5, 5, 4, 0)
    assert 5 <= report.output_tokens <= 5 * 4
    assert report.instruction_tokens % 5 == 0
    assert report.seconds > 0
    assert report.prefix_hit_rate > 0.9  # the same prompts ran before


def test_one_row_batches_and_empty_partitions(session: SparkSession, expected: dict[int, str | None]) -> None:
    session.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", "1")
    session.conf.set("spark.llm.windowRows", "3")
    assert answers(session, "(SELECT /*+ REPARTITION(20, id) */ * FROM places)") == expected
    assert report_of(session).rows == 14


def test_row_by_row_without_reuse(session: SparkSession, expected: dict[int, str | None]) -> None:
    for key, value in {
        "windowRows": "1",
        "windowsInFlight": "1",
        "optimizer.enabled": "false",
        "engine.prefixCache": "false",
    }.items():
        session.conf.set(f"spark.llm.{key}", value)
    assert answers(session) == expected
    report = report_of(session)
    assert (report.calls, report.duplicates) == (10, 0)
    assert report.cached_tokens == 0


def test_a_large_partition_with_few_distinct_rows(session: SparkSession, expected: dict[int, str | None]) -> None:
    session.sql(
        f"""CREATE OR REPLACE TEMP VIEW large AS
            SELECT /*+ COALESCE(1) */ id, element_at(array('{"', '".join(COUNTRIES)}'), int(id % 5) + 1) AS country
            FROM range(0, 100000, 1, 1)"""
    )
    session.conf.set("spark.llm.optimizer.aggregateDistinct.enabled", "false")  # all rows are to reach the task
    found = session.sql(f"SELECT id % 5, a, count(*) FROM (SELECT id, {ASK} a FROM large) GROUP BY ALL").collect()
    assert {row[0]: (row[1], row[2]) for row in found} == {n: (expected[n], 20_000) for n in range(5)}
    report = report_of(session)
    assert (report.rows, report.calls, report.duplicates) == (100_000, 5, 99_995)
    session.conf.unset("spark.llm.optimizer.aggregateDistinct.enabled")


def test_a_row_too_long_for_the_context(session: SparkSession) -> None:
    query = "SELECT llm('Say yes.', repeat('word ', n), max_tokens => 2) AS a FROM VALUES (1), (20000) AS t(n)"
    found = [row.a for row in session.sql(query).collect()]
    assert found[0] is not None
    assert found[1] is None
    report = report_of(session)
    assert (report.calls, report.failed) == (1, 1)
    assert report.errors[0].startswith("[LLM_CONTEXT_LENGTH_EXCEEDED]")
    session.conf.set("spark.llm.onError", "fail")
    with pytest.raises(PythonException, match=r"\[LLM_ROW_FAILED\].*\[LLM_CONTEXT_LENGTH_EXCEEDED\]"):
        session.sql(query).collect()


def test_a_seeded_sample_repeats_at_any_partitioning(session: SparkSession) -> None:
    def sample(seed: int, partitions: int) -> dict[int, str]:
        call = f"llm('Name a fruit.', id, max_tokens => 5, temperature => 1.5, seed => {seed})"
        return dict(session.sql(f"SELECT id, {call} FROM range(0, 6, 1, {partitions})").collect())

    assert sample(1, 1) == sample(1, 3)
    assert sample(1, 1) != sample(2, 1)


def test_two_calls_of_a_query_share_a_report(session: SparkSession) -> None:
    session.sql("SELECT llm('Say a.', id, max_tokens => 1), llm('Say b.', id, max_tokens => 1) FROM range(3)").collect()
    report = report_of(session)
    assert report.calls == 6
    assert {prompt: part.calls for prompt, part in report.by_call.items()} == {"Say a.": 3, "Say b.": 3}
    assert report.output_tokens == 6


def test_show_is_reported(session: SparkSession) -> None:
    session.sql("SELECT llm('Say c.', id, max_tokens => 1) AS a FROM range(0, 100, 1, 1)").show(3)
    report = spark_llm.last_report(session)
    assert report is not None
    assert "Say c." in report.by_call
    assert 3 <= report.calls <= 4


def test_a_query_again_is_answered_from_the_result_cache_until_it_is_cleared(
    session: SparkSession, expected: dict[int, str | None]
) -> None:
    session.conf.set("spark.llm.cache.enabled", "true")
    spark_llm.clear_cache(session)
    for calls, stored in [(5, 0), (0, 5)]:
        assert answers(session) == expected
        report = report_of(session)
        assert (report.calls, report.stored, report.duplicates) == (calls, stored, 5)
    spark_llm.clear_cache(session)
    assert answers(session) == expected
    assert (report_of(session).calls, report_of(session).stored) == (5, 0)


@pytest.fixture
def ask_group(spark: SparkSession) -> Iterator[Callable[..., Column]]:
    """ask_group(mask, limit => n ...): two calls about the column ``id``, the second for rows where the mask holds."""
    settings = {"engine.dtype": "float32", "engine.threads": "1", "cache.enabled": "false", "windowRows": "8"}
    for key, text in settings.items():
        spark.conf.set(f"spark.llm.{key}", text)
    udf = make_udf(install(spark), calls=2).asNondeterministic()

    def ask(mask: Column, **changes: object) -> Column:
        spec = CallSpec(fields=(FieldSpec("n"),), max_tokens=2, rows=RowPlan(fold=True))
        calls = (spec, msgspec.structs.replace(spec, masked=True))
        group = GroupSpec(calls=calls, arguments=((0, 2), (1, 2, 3)), **changes)  # type: ignore[arg-type]
        prompts = [F.lit("Say the number."), F.lit("Is it even?")]
        return udf(F.lit(group.encode()), *prompts, F.col("id").cast("string"), mask)

    yield ask
    for key in settings:
        spark.conf.unset(f"spark.llm.{key}")


def test_a_group_answers_as_its_calls_do_alone(spark: SparkSession, ask_group: Callable[..., Column]) -> None:
    rows = spark.range(0, 10, 1, 2).select("id", ask_group(F.col("id") < 4).alias("a")).collect()
    again = spark.range(0, 4, 1, 1).select("id", ask_group(F.lit(True)).alias("a")).collect()
    assert [row.a for row in rows[:4]] == [row.a for row in again]
    assert all(row.a.a0 is not None and (row.a.a1 is None) == (row.id >= 4) for row in rows)
    by_call = report_of(spark).by_call
    assert {prompt: part.calls for prompt, part in by_call.items()} == {"Say the number.": 4, "Is it even?": 4}


def test_the_engine_ends_a_group_under_a_limit(spark: SparkSession, ask_group: Callable[..., Column]) -> None:
    limited = ask_group(F.col("id") % 2 == 0, conditions=(["isnotnull", ["answer", 1]],), limit=3, node="test")
    found = spark.range(0, 400, 1, 2).select("id", limited.alias("a")).where("a.a1 IS NOT NULL").collect()
    assert len(found) >= 3
    assert all(row.id % 2 == 0 for row in found)
    report = report_of(spark)
    # Two calls a row; twice the rows up to the third hit of one task, and a window of the other.
    assert report.calls <= 2 * (2 * 6 + 8)
    assert report.rows == 800
