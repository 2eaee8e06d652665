"""Runs one example twice: as it is, and naively (a row at a time, nothing reused) on a sample of its input."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import spark_llm

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

    from spark_llm.demo.examples import Example
    from spark_llm.report import Report

# One row in flight, no plan rule, no fold, no prefix cache: what a plain UDF around a model does.
NAIVE = {
    "spark.llm.windowRows": "1",
    "spark.llm.windowsInFlight": "1",
    "spark.llm.optimizer.enabled": "false",
    "spark.llm.engine.prefixCache": "false",
}
SAMPLED_ROWS = 12
_COUNTS = (
    "rows",
    "calls",
    "duplicates",
    "nulls",
    "failed",
    "stored",
    "skipped",
    "over_budget",
    "prompt_tokens",
    "instruction_tokens",
    "cached_tokens",
    "cached_instruction_tokens",
    "computed_tokens",
    "output_tokens",
    "seconds",
    "prefix_hit_rate",
    "data_hit_rate",
    "instruction_hit_rate",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One run: its result, the report of its calls, and the seconds from submit to the last row."""

    rows: list[Row]
    report: Report
    wall_seconds: float

    @property
    def seconds_per_row(self) -> float:
        """Seconds of calling a row that reached llm()."""
        return self.report.seconds / max(1, self.report.rows)

    def as_json(self) -> dict[str, Any]:
        """The counters, for the machine-readable results."""
        values = {name: getattr(self.report, name) for name in _COUNTS}
        return values | {
            "result_rows": len(self.rows),
            "wall_seconds": self.wall_seconds,
            "seconds_per_row": self.seconds_per_row,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """An example's two runs, the second on ``sampled`` rows of its view.

    ``same`` of ``compared`` result rows of the sample came out alike in both; None for aggregates.
    """

    example: Example
    ours: Measured
    naive: Measured
    sampled: int
    same: int | None
    compared: int

    @property
    def speedup(self) -> float:
        """Naive seconds per row over ours."""
        return self.naive.seconds_per_row / max(self.ours.seconds_per_row, 1e-9)


def run(spark: SparkSession, select: str) -> Measured:
    """Run a query that calls llm() and collect its rows."""
    started = time.monotonic()
    rows = spark.sql(select).collect()
    seconds = time.monotonic() - started
    report = spark_llm.last_report(spark)
    assert report is not None
    return Measured(rows, report, seconds)


def run_naively(spark: SparkSession, example: Example, ours: Measured) -> Comparison:
    """Run an example's query naively on a random sample of its view, which is put back afterwards."""
    sample, sampled = _sample(spark.table(example.view))
    try:
        sample.createOrReplaceTempView(example.view)
        with settings(spark, NAIVE):
            naive = run(spark, example.select)
    finally:
        spark.sql(example.create_view)
    if example.is_aggregate:
        return Comparison(example, ours, naive, sampled, None, 0)
    same, compared = _compare(sample, ours.rows, naive.rows)
    return Comparison(example, ours, naive, sampled, same, compared)


@contextlib.contextmanager
def settings(spark: SparkSession, values: Mapping[str, str]) -> Iterator[None]:
    """Set keys of the session's configuration inside the block."""
    before = {key: spark.conf.get(key, None) for key in values}
    for key, value in values.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)


def _sample(table: DataFrame, rows: int = SAMPLED_ROWS, seed: int = 1) -> tuple[DataFrame, int]:
    """The same random rows every time, in one partition, and how many: first by a hash of all columns."""
    from pyspark.sql import functions as F

    mixed = F.xxhash64(F.lit(seed), *[F.col(name) for name in table.columns])
    chosen = table.orderBy(mixed).limit(rows).collect()
    return table.sparkSession.createDataFrame(chosen, schema=table.schema).coalesce(1), len(chosen)


def _compare(sample: DataFrame, ours: list[Row], naive: list[Row]) -> tuple[int, int]:
    """How many result rows of the sample are the same in both runs, and how many there are in either."""
    if not ours:
        return 0, len(naive)
    columns = [name for name in sample.columns if name in ours[0].asDict()]
    sampled = {tuple(row[name] for name in columns) for row in sample.collect()}
    expected = Counter(row for row in ours if tuple(row[name] for name in columns) in sampled)
    found = Counter(naive)
    return (expected & found).total(), (expected | found).total()
