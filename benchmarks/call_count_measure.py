"""Counts the calls of each query shape with the rules and without, as tests/spark/test_calls_made.py asserts them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from call_count_engine import FakeCountingEngine, fake_counting_engine, fake_sums
from call_count_shapes import SHAPES, make_tables
from results import aligned

import spark_llm

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

REFUSED = "[UNSUPPORTED_FEATURE.PYTHON_UDF_IN_ON_CLAUSE]"


@dataclass(frozen=True)
class Counted:
    """Calls of one shape; None where Spark refuses the query. evaluated: rows for which our function ran."""

    name: str
    stock: int | None
    least: int
    bound: int
    ours: int | None
    evaluated: int | None


def run(say: Callable[[str], None]) -> list[Counted]:
    """All shapes."""
    spark = spark_llm.session(
        "local[2]",
        progress="false",
        cache_enabled=False,
        conf={"spark.ui.enabled": "false", "spark.driver.memory": "1g"},
    )
    spark.sparkContext.setLogLevel("ERROR")
    found = []
    try:
        with tempfile.TemporaryDirectory() as folder, fake_counting_engine(spark, fake_sums) as engine:
            make_tables(spark, Path(folder))
            for shape in SHAPES:
                spark.conf.set("spark.llm.optimizer.enabled", "false")
                stock = calls(spark, engine, shape.sql)
                spark.conf.set("spark.llm.optimizer.enabled", "true")
                ours = calls(spark, engine, shape.sql)
                report = spark_llm.last_report(spark) if ours else None
                evaluated = 0 if report is None else report.rows - report.skipped
                found.append(Counted(shape.name, stock, shape.least, shape.bound, ours, evaluated))
                say("  ".join(cells_of(found[-1])))
    finally:
        spark.stop()
    return found


def calls(spark: SparkSession, engine: FakeCountingEngine, sql: str) -> int | None:
    """Calls of one query; None if Spark refuses it."""
    from pyspark.errors import AnalysisException

    engine.forget()
    try:
        spark.sql(sql).collect()
    except AnalysisException as error:
        if REFUSED not in str(error):
            raise
        return None
    return engine.calls


HEADER = ("query shape", "stock Spark", "least possible", "ours", "rows evaluated", "")


def cells_of(found: Counted) -> tuple[str, ...]:
    """One line of the table."""
    least = f"{found.least:,}" if found.bound == found.least else f"{found.least:,} (bound {found.bound:,})"
    is_met = found.ours is not None and found.ours <= found.bound
    return (
        found.name,
        "refused" if found.stock is None else f"{found.stock:,}",
        least,
        "refused" if found.ours is None else f"{found.ours:,}",
        f"{found.evaluated or 0:,}",
        "" if is_met else "MISS",
    )


def report(record: Mapping[str, Any]) -> str:
    """The table, from the JSON record."""
    found = [Counted(**entry) for entry in record["shapes"]]
    met = sum(each.ours is not None and each.ours <= each.bound for each in found)
    return "\n".join([aligned([HEADER, *map(cells_of, found)]), "", f"{met} of {len(found)} shapes within their bound"])


def as_record(found: Sequence[Counted]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(each) for each in found]
