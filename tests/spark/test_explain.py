"""``spark_llm.explain``: what it prints, what it knows without a job, what it leaves alone, estimates beside facts."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_counting import FakeModel
from plans import golden, orders, settings, spark_jobs
from pyspark.sql import SparkSession

import spark_llm
from spark_llm.errors import LlmError
from spark_llm.explaining import CallExplanation, Explanation

pytestmark = pytest.mark.spark

ROWS = (
    "SELECT id, id % 4 AS k, if(id % 50 = 0, NULL, concat('a longer text ', id % 20)) AS text FROM range(0, 200, 1, 2)"
)


@pytest.fixture
def t(model: FakeModel) -> FakeModel:
    """t(id, k, text): 200 rows, 4 of them without text, else 20 texts."""
    model.spark.sql(ROWS).createOrReplaceTempView("t")
    settings(model.spark, statistics_timeout="2min")  # on a busy machine
    return model


@pytest.fixture
def analysed(t: FakeModel) -> Iterator[FakeModel]:
    """As t, with a table ``counted`` of the same rows that the catalog has statistics of."""
    t.spark.sql("DROP TABLE IF EXISTS counted")
    t.spark.sql("CREATE TABLE counted USING parquet AS SELECT * FROM t")
    t.spark.sql("ANALYZE TABLE counted COMPUTE STATISTICS FOR ALL COLUMNS")
    yield t
    t.spark.sql("DROP TABLE counted")


def explained(spark: SparkSession, query: str, mode: str = "plan") -> Explanation:
    with contextlib.redirect_stdout(io.StringIO()):
        return spark_llm.explain(spark.sql(query), mode)  # type: ignore[arg-type]


def why(call: CallExplanation, rule: str) -> tuple[bool, str]:
    [note] = [note for note in call.notes if note.rule == rule]
    return note.fired, note.why


def masked(text: str) -> str:
    """Without the engine's speed, which depends on the tests before, and without the rules that there are."""
    text = re.sub(r"engine of [\d,]+ tokens a second \(.*\)", "engine of N tokens a second (HOW)", text)
    text = re.sub(r"(?m)^(   seconds +)(~|<=) [\d.,]+", lambda found: f"{found[1]}{found[2]} N", text)
    return re.sub(r"nothing to do: .*(\n     .*)*", "nothing to do: RULES", text)


# Without running


def test_the_layout(analysed: FakeModel) -> None:
    printed = io.StringIO()
    query = "SELECT id FROM counted WHERE id < 150 AND llm('Is it long?', text, k, max_tokens => 2) = 'yes' ORDER BY id"
    found = spark_llm.explain(analysed.spark.sql(query), file=printed)
    assert printed.getvalue() == f"{found}\n"
    assert all(len(line) <= 110 for line in printed.getvalue().splitlines())
    assert masked(str(found)) == golden(
        """
        1 call of llm(), by an engine of N tokens a second (HOW)

        1. 'Is it long?'
           asked for the rows of counted, filtered, below a filter, a sort
           estimated from the plan alone (no job runs for EXPLAIN)
           not known: rows, asked, distinct, calls, prompt tokens, prefix hits, output tokens, computed tokens,
             seconds
           - placeInstruction: first: all rows share it
           - reorderColumns: text, k: by rule of thumb, by the plan alone (no job runs for EXPLAIN)
           + deduplicatePrompts: rows with equal arguments are asked once
           + reorderRows: sorted in 2 partitions by text
           nothing to do: RULES

        the query
           + shuffleBelowSort: an exchange below the global sort, which runs what is below twice

        <= is at most, ~ is about. Estimates leave out what the result cache answers.
        What is not known here, ANALYZE TABLE ... COMPUTE STATISTICS FOR ALL COLUMNS tells, or a run of the query, or
        spark_llm.explain(df, mode="analyze").
        """
    )


def test_the_catalog_tells_what_a_call_costs(analysed: FakeModel) -> None:
    found = explained(analysed.spark, "SELECT llm('p', text, max_tokens => 4) FROM counted")
    [call] = found.calls
    assert call.source == "the catalog"
    lines = [" ".join(line.split()) for line in masked(str(found)).splitlines()]
    assert lines[6:10] == ["rows ~ 200", "asked ~ 200", "distinct ~ 20", "calls ~ 20"]
    cost = call.estimate
    assert {number.source for number in (cost.prompt_tokens, cost.hits, cost.output_tokens)} == {"catalog"}
    assert (cost.output_tokens.value, cost.output_tokens.kind) == (80, "at most")
    assert cost.prompt_tokens.value is not None
    assert 20 * 35 < cost.prompt_tokens.value < 20 * 45
    assert lines[14] == "seconds <= N"


def test_a_plan_costs_no_call_and_no_job(t: FakeModel) -> None:
    jobs = spark_jobs(t.spark)
    found = explained(t.spark, "SELECT llm('p', id, text, k) FROM t WHERE id < 111")
    assert found.report is None
    assert not found.calls[0].estimate.calls.is_known
    assert 'mode="analyze"' in str(found)
    assert spark_jobs(t.spark) == jobs
    assert t.engine_calls() == 0


def test_what_an_earlier_query_counted_is_known(t: FakeModel) -> None:
    query = "SELECT llm('p', id, text, k), llm('q', k, upper(text)) FROM t WHERE id < 112"
    t.spark.sql(query).collect()
    jobs = spark_jobs(t.spark)
    found = explained(t.spark, query)
    assert [call.estimate.calls.value for call in found.calls] == [112, 22]
    assert all(call.estimate.seconds.is_known for call in found.calls)
    assert spark_jobs(t.spark) == jobs


def test_the_query_itself_is_left_alone(t: FakeModel) -> None:
    df = t.spark.sql("SELECT llm('p', id, text, k) FROM t WHERE id < 113")
    with contextlib.redirect_stdout(io.StringIO()):
        spark_llm.explain(df)
    assert orders(df) == [["k", "text", "id"]]  # by a job, which EXPLAIN would not run


def test_a_query_without_calls(t: FakeModel) -> None:
    found = explained(t.spark, "SELECT id FROM t", "analyze")
    assert (str(found), found.calls, found.report) == ("The query calls no llm().", [], None)


@pytest.mark.parametrize(
    ("query", "placement"),
    [
        ("SELECT llm('p', text) FROM t", "asked for the rows of a range"),
        (
            "SELECT a.id FROM t AS a JOIN t AS b USING (id) WHERE llm('p', a.text, b.k) = 'x'",
            "asked for the rows of a range joined with a range, below a filter",
        ),
        ("SELECT (SELECT max(llm('p', text)) FROM t)", "asked for the rows of a range, below an aggregation"),
        ("SELECT if(k = 1, llm('p', text), 'none') FROM t", "asked for the rows of a range, where its mask holds"),
        ("SELECT llm('p', x) FROM (SELECT max(text) AS x FROM t GROUP BY k)", "asked for the rows of a range, grouped"),
    ],
)
def test_where_a_call_stands(t: FakeModel, query: str, placement: str) -> None:
    settings(t.spark, aggregateDistinct_enabled=False)
    assert [call.placement for call in explained(t.spark, query).calls] == [placement]


def test_calls_of_one_node_and_where_they_stop(t: FakeModel) -> None:
    query = "SELECT id FROM t WHERE llm('p', text) = 'x' AND llm('q', text, k) = 'y' LIMIT 3"
    placements = [call.placement for call in explained(t.spark, query).calls]
    assert len(placements) == 2
    for placement in placements:
        assert "in one node with 1 other call, until a condition drops them, until 3 rows are kept" in placement


def test_rules_that_may_not_work(t: FakeModel) -> None:
    [call] = explained(t.spark, "SELECT llm('p', text, k, order => 'as_written') FROM t").calls
    assert why(call, "reorderColumns") == (False, "order => 'as_written'")
    settings(t.spark, mayChangePrompts=False, reorderRows_enabled=False)
    found = explained(t.spark, "SELECT llm('p', text, k, temperature => 1) FROM t")
    assert why(found.calls[0], "reorderColumns") == (False, "spark.llm.optimizer.mayChangePrompts is false")
    assert why(found.calls[0], "deduplicatePrompts") == (False, "drawn without a seed")
    assert found.off == ["reorderRows"]
    assert "switched off: reorderRows" in str(found)


def test_what_may_not_be_explained(t: FakeModel) -> None:
    with pytest.raises(LlmError, match="LLM_INVALID_ARGUMENT"):
        explained(t.spark, "SELECT id FROM t", "run")
    with pytest.raises(LlmError, match="a query that ends"):
        spark_llm.explain(t.spark.readStream.format("rate").load())


# With running


def test_estimates_beside_facts(t: FakeModel) -> None:
    query = (
        "SELECT llm('p', text, max_tokens => 3) FROM t WHERE id < 120 UNION ALL SELECT llm('q', id) FROM t WHERE k = 1"
    )
    found = explained(t.spark, query, "analyze")
    first, second = found.calls
    assert found.report is not None
    assert first.actual is not None
    assert second.actual is not None
    assert (first.estimate.rows.value, first.actual.rows) == (120, 120)
    assert (first.estimate.asked.value, first.actual.nulls) == (117, 3)
    assert (first.estimate.calls.value, first.actual.calls) == (20, 20)
    assert (second.estimate.calls.value, second.actual.calls) == (50, 50)
    assert found.total.calls.value == found.report.calls == 70
    assert t.engine_calls() == 70
    assert "97 took the answer of an equal row, 3 were NULL without a call" in re.sub(r"\s+", " ", str(found))
    assert f"{found.report.prompt_tokens:,}" in str(found)


def test_inputs_that_the_rules_have_grouped(t: FakeModel) -> None:
    found = explained(t.spark, "SELECT llm('p', upper(text)), count(*) FROM t GROUP BY 1", "analyze")
    [call] = found.calls
    assert call.actual is not None
    assert call.estimate.rows.value == call.actual.rows == 21
    assert call.estimate.calls.value == call.actual.calls == 20


def test_the_report_is_of_this_query(t: FakeModel) -> None:
    before = explained(t.spark, "SELECT llm('p', text) FROM t WHERE id < 30", "analyze")
    t.spark.sql("SELECT llm('p', id) FROM t").collect()
    again = explained(t.spark, "SELECT llm('p', text) FROM t WHERE id < 30", "analyze")
    assert before.report is not None
    assert again.report is not None
    assert before.report.rows == again.report.rows == 30
    assert before.report.query != again.report.query
    assert t.spark.sparkContext.getLocalProperty("spark.job.description") is None


def test_no_row_that_needs_an_answer(t: FakeModel) -> None:
    [call] = explained(t.spark, "SELECT llm('p', text) FROM t WHERE id < 0 AND k > 7", "analyze").calls or [None]
    assert call is None or call.actual is None or call.actual.calls == 0


# Names


def test_exported_names_are_functions_in_any_order() -> None:
    for first in ("enable", "explain", "LlmError"):
        code = (
            f"import spark_llm; spark_llm.{first}; assert callable(spark_llm.session) and callable(spark_llm.explain)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
