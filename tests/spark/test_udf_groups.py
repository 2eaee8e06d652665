"""Masks, groups of calls, conditions, limits and budgets inside real Spark tasks, with a model that counts calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_counting import FakeModel, fake_counting_udf, fake_model, numbered
from pyspark.errors import PythonException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_llm import last_report
from spark_llm.call import Budget, CallSpec, FieldSpec, GroupSpec, RowPlan
from spark_llm.report import Report, install

pytestmark = pytest.mark.spark

YES: list[Any] = ["literal", "yes"]
IS_YES = [["=", ["answer", 0], YES], ["=", ["answer", 1], YES]]


class Asks:
    """Columns that ask a FakeModel about the column ``id``; the calls of ``group`` have the prompts p0, p1 ..."""

    def __init__(self, spark: SparkSession, folder: Path, answers: Callable[[str], str]) -> None:
        self.model = FakeModel(spark, folder)
        self._sink = install(spark).sink
        self._settings = {"folder": str(folder), "reads_order": True, "answers": answers, "tell": numbered}

    def _udf(self, calls: int) -> Any:
        udf = fake_counting_udf(self._sink, {}, calls, **self._settings)  # type: ignore[arg-type]
        return udf.asNondeterministic()  # so that Spark runs it in one place, as our rules see to

    @staticmethod
    def spec(**changes: Any) -> CallSpec:
        return CallSpec(**({"fields": (FieldSpec("id"),), "rows": RowPlan(fold=True)} | changes))

    def one(self, prompt: str, mask: Column | None = None, **changes: Any) -> Column:
        columns = [F.lit(prompt), F.col("id").cast("string")]
        spec = self.spec(masked=mask is not None, **changes)
        return self._udf(0)(F.lit(spec.encode()), *columns, *([] if mask is None else [mask]))

    def group(self, calls: int, mask: Column | None = None, **changes: Any) -> Column:
        """mask: of the last call."""
        specs = [self.spec(masked=mask is not None and call == calls - 1) for call in range(calls)]
        arguments = [(call, calls, calls + 1) if spec.masked else (call, calls) for call, spec in enumerate(specs)]
        group = GroupSpec(calls=tuple(specs), arguments=tuple(arguments), **changes)
        columns = [*(F.lit(f"p{call}") for call in range(calls)), F.col("id").cast("string")]
        return self._udf(calls)(F.lit(group.encode()), *columns, *([] if mask is None else [mask]))


@pytest.fixture
def asks(spark: SparkSession, tmp_path: Path) -> Iterator[Callable[..., Asks]]:
    """Makes Asks over a function from messages to answers; windows have 8 rows."""
    spark.conf.set("spark.llm.windowRows", 8)
    yield lambda answers: Asks(spark, tmp_path, answers)
    spark.conf.unset("spark.llm.windowRows")


def numbers(spark: SparkSession, rows: int, partitions: int = 2) -> DataFrame:
    return spark.range(0, rows, 1, partitions)


def report_of(spark: SparkSession) -> Report:
    report = last_report(spark)
    assert report is not None
    counted = report.calls + report.duplicates + report.stored + report.skipped + report.nulls + report.failed
    assert report.rows == counted + report.over_budget
    return report


def echoes(asks: Callable[..., Asks]) -> Asks:
    return asks(lambda message: message.replace("\n", "|"))


def divides(asks: Callable[..., Asks], *shares: int) -> Asks:
    """Call i says yes to the ids that shares[i] divides."""

    def answer(message: str) -> str:
        prompt, value = message.strip().split("\n")
        return "yes" if int(value.split('"')[1]) % shares[int(prompt[1:])] == 0 else "no"

    return asks(answer)


def test_rows_that_the_mask_does_not_let_through_are_null(spark: SparkSession, asks: Callable[..., Asks]) -> None:
    ask = echoes(asks)
    mask = F.when(F.col("id") % 3 == 0, True).when(F.col("id") % 3 == 1, False)
    rows = numbers(spark, 30).select("id", ask.one("p", mask).alias("a")).collect()
    assert [row.a for row in rows] == [f'p|id: "{n}"|' if n % 3 == 0 else None for n in range(30)]
    report = report_of(spark)
    assert (report.rows, report.calls, report.skipped) == (30, 10, 20)
    assert len(ask.model.requests()) == 10


def test_siblings_are_one_struct_and_a_call_each_in_the_report(spark: SparkSession, asks: Callable[..., Asks]) -> None:
    ask = echoes(asks)
    rows = numbers(spark, 30, 3).select("id", ask.group(3, mask=F.col("id") < 10).alias("a")).collect()
    for row in rows:
        texts = [f'p{call}|id: "{row.id}"|' for call in range(3)]
        assert list(row.a) == [*texts[:2], texts[2] if row.id < 10 else None]
    report = report_of(spark)
    assert {prompt: (part.rows, part.calls) for prompt, part in report.by_call.items()} == {
        "p0": (30, 30),
        "p1": (30, 30),
        "p2": (30, 10),
    }


def test_an_empty_table_of_a_group(spark: SparkSession, asks: Callable[..., Asks]) -> None:
    assert numbers(spark, 0).select(echoes(asks).group(2)).collect() == []


def test_conditions_drop_rows_between_calls(spark: SparkSession, asks: Callable[..., Asks]) -> None:
    ask = divides(asks, 2, 20)
    found = numbers(spark, 400, 1).select("id", ask.group(2, conditions=IS_YES).alias("a"))
    rows = found.where("a.a0 = 'yes' AND a.a1 = 'yes'").collect()
    assert [row.id for row in rows] == list(range(0, 400, 20))
    assert 420 <= len(ask.model.requests()) <= 420 + 64
    assert report_of(spark).skipped == 800 - len(ask.model.requests())


@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_a_limit_stops_all_tasks(spark: SparkSession, asks: Callable[..., Asks], partitions: int) -> None:
    ask = divides(asks, 5)
    limited = ask.group(1, conditions=IS_YES[:1], limit=4, node="n")
    found = numbers(spark, 2000, partitions).select("id", limited.alias("a")).where("a.a0 = 'yes'").collect()
    assert len(found) >= 4
    assert all(row.id % 5 == 0 for row in found)
    # Windows of 2 tasks beside each other, of at most 8 rows; twice the rows up to the fourth hit of one of them.
    assert len(ask.model.requests()) <= 2 * 16 * 2 + 2 * 8
    assert report_of(spark).skipped == 2000 - len(ask.model.requests())


def test_a_limit_that_is_not_reached_asks_all(spark: SparkSession, asks: Callable[..., Asks]) -> None:
    ask = divides(asks, 50)
    limited = ask.group(1, conditions=IS_YES[:1], limit=4, node="n")
    found = numbers(spark, 120, 3).select("id", limited.alias("a")).where("a.a0 = 'yes'").collect()
    assert [row.id for row in found] == [0, 50, 100]
    assert len(ask.model.requests()) == 120


def test_beyond_the_budget_rows_are_null_or_the_query_fails(spark: SparkSession, asks: Callable[..., Asks]) -> None:
    ask = echoes(asks)
    partial = ask.one("p", budget=Budget(calls=7, partial=True))
    rows = numbers(spark, 20).select(partial.alias("a")).collect()
    assert sum(row.a is not None for row in rows) == 7
    report = report_of(spark)
    assert (report.calls, report.over_budget, report.failed, report.errors) == (7, 13, 0, ())
    with pytest.raises(PythonException, match=r"\[LLM_BUDGET_EXCEEDED\].*maxCalls"):
        numbers(spark, 20).select(ask.one("p", budget=Budget(calls=7))).collect()


def test_the_fake_model_says_yes_and_no_in_sql(spark: SparkSession, tmp_path: Path) -> None:
    with fake_model(spark, tmp_path, True, answers=("yes", "no")) as model:
        rows = model.spark.sql("SELECT llm('p', id) AS a, count(*) AS n FROM range(100) GROUP BY a").collect()
    assert {row.a for row in rows} == {"yes", "no"}
    assert sum(row.n for row in rows) == 100
