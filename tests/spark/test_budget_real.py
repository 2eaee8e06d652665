"""Budgets on the real engine: what is refused, what stops on the way, how a rerun completes it; and explain there."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import pytest
from pyspark.errors import AnalysisException, PythonException
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import Report

pytestmark = [pytest.mark.spark, pytest.mark.model]

TOWNS = "SELECT id, concat('town ', id % 12) AS town FROM range(0, 24, 1, 2)"
ASK = "llm('Is this a town? Answer yes or no.', town, max_tokens => 1)"


@pytest.fixture(scope="module")
def session(spark: SparkSession) -> SparkSession:
    """A session whose engine computes in float32, with a table of 24 rows and 12 towns."""
    session = spark_llm.enable(spark.newSession(), engine_dtype="float32", engine_threads=1)
    session.conf.set("spark.llm.optimizer.statistics.timeout", "2min")
    session.sql(TOWNS).createOrReplaceTempView("towns")
    return session


@pytest.fixture(autouse=True)
def configured(session: SparkSession) -> Iterator[None]:
    """Each test starts with an empty cache and no budget."""
    spark_llm.clear_cache(session)
    yield
    for key in ("maxCalls", "maxLength", "maxTime", "onExceeded"):
        session.conf.unset(f"spark.llm.budget.{key}")


def report_of(session: SparkSession) -> Report:
    report = spark_llm.last_report(session)
    assert report is not None
    return report


def test_a_partial_answer_is_completed_by_reruns(session: SparkSession) -> None:
    query = f"SELECT id, {ASK} AS answer FROM towns"
    whole = {row.id: row.answer for row in session.sql(query).collect()}
    assert (report_of(session).calls, report_of(session).over_budget) == (12, 0)
    spark_llm.clear_cache(session)
    session.conf.set("spark.llm.budget.maxCalls", "5")
    session.conf.set("spark.llm.budget.onExceeded", "partial")
    stored = 0
    for calls in (5, 5, 2):
        rows = {row.id: row.answer for row in session.sql(query).collect()}
        report = report_of(session)
        assert report.calls == calls
        assert report.rows == report.calls + report.duplicates + report.stored + report.over_budget
        assert all(answer == whole[row] for row, answer in rows.items() if answer is not None)
        assert sum(answer is None for answer in rows.values()) == report.over_budget
        assert report.stored >= stored
        stored = report.stored
    assert rows == whole
    assert report.over_budget == 0


def test_a_query_that_is_beyond_its_budget_ends(session: SparkSession) -> None:
    session.conf.set("spark.llm.budget.maxCalls", "5")
    with pytest.raises(AnalysisException, match=r"LLM_BUDGET_EXCEEDED.*it would make 12 calls"):
        session.sql(f"SELECT {ASK} FROM towns").collect()
    # A mask makes the estimate a bound: the engine sees to it.
    masked = f"SELECT if(id < 20, {ASK}, 'none') FROM towns"
    with pytest.raises(PythonException, match=r"LLM_BUDGET_EXCEEDED.*the engine has made 5 calls"):
        session.sql(masked).collect()
    session.conf.set("spark.llm.budget.maxCalls", "12")
    assert session.sql(masked).count() == 24


def test_the_length_of_prompts_and_answers_is_kept(session: SparkSession) -> None:
    session.conf.set("spark.llm.budget.maxLength", "200")
    session.conf.set("spark.llm.budget.onExceeded", "partial")
    session.sql(f"SELECT {ASK} FROM towns").collect()
    report = report_of(session)
    assert report.over_budget > 0
    assert report.calls > 0
    # A prompt counts when its row is admitted, which the one before it must leave room for.
    assert report.prompt_tokens * (report.calls - 1) / report.calls < 200


def test_an_estimate_beside_what_an_engine_did(session: SparkSession) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        found = spark_llm.explain(session.sql(f"SELECT {ASK} FROM towns WHERE id < 23"), "analyze")
    [call] = found.calls
    assert call.actual is not None
    assert (call.estimate.rows.value, call.actual.rows) == (23, 23)
    assert (call.estimate.calls.value, call.actual.calls) == (12, 12)
    assert call.estimate.prompt_tokens.value == pytest.approx(call.actual.prompt_tokens, rel=0.3)
