"""The paper's 16 queries end to end on the demo model: without a cache, with one in stored order, and as we run them.

The tables are reduced, and so is the cache: it holds 4,096 tokens, about a fifth of a query (at full size the paper's
held about a hundredth). Each way has a system message of its own, equally long, so that none finds what another left.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import Machine
from prefix_order_hits import Hits
from prefix_order_spark import hits_of
from results import aligned, judge

import spark_llm
from spark_llm.datasets import paper
from spark_llm.demo.measure import settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# About 20,000 prompt tokens a query.
ROWS = {"movies": 80, "products": 60, "bird": 36, "pdmx": 30, "beer": 100, "squad": 24, "fever": 20}
CACHE_TOKENS = 4_096
VALUES_A_TOKEN = 30 * 2 * 3 * 64  # layers, keys and values, heads, width of the demo model

NONE, STORED, OURS = "no cache", "cache, stored order", "ours"
# Windows of one row reach the engine in the order in which they are stored; 32 of a task wait there at a time.
AS_STORED = {
    "spark.llm.optimizer.enabled": "false",
    "spark.llm.windowRows": "1",
    "spark.llm.windowsInFlight": "32",
}
WAYS: Mapping[str, Mapping[str, str]] = {
    NONE: AS_STORED | {"spark.llm.engine.prefixCache": "false"},
    STORED: AS_STORED,
    OURS: {},
}
_FIRST = "SELECT llm('Say yes.', max_tokens => 1)"


@dataclass(frozen=True)
class Case:
    """One query run one way.

    seconds: from submit to the last row. call_seconds: of them, from the first request to the last answer. hits: of
    the prompts that were asked; duplicates: rows that took an equal row's answer. answers: the result, for comparing.
    """

    query: str
    way: str
    rows: int
    calls: int
    duplicates: int
    seconds: float
    call_seconds: float
    computed_tokens: int
    output_tokens: int
    hits: Hits
    answers: list[str]


def run(rows: int | None, machine: Machine, names: Sequence[str], say: Callable[[str], None]) -> list[Case]:
    """The queries ``names`` in all ways, one engine for all of them."""
    dtype, width = ("bfloat16", 2) if machine.has_bfloat16 else ("float32", 4)
    spark = spark_llm.session(
        "local[2]",
        progress="false",
        conf={"spark.ui.enabled": "false", "spark.driver.memory": "1g"},
        engine_dtype=dtype,
        engine_kv_cache_memory=str(CACHE_TOKENS * VALUES_A_TOKEN * width),
        on_error="fail",
        cache_enabled=False,
    )
    spark.sparkContext.setLogLevel("ERROR")
    cases = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in dict.fromkeys(paper.QUERIES[query].table for query in names):
                path = str(Path(folder) / name)
                spark.createDataFrame(paper.table(name, rows or ROWS[name])).repartition(2).write.parquet(path)
                spark.read.parquet(path).createOrReplaceTempView(name)
            spark.sql(_FIRST).collect()
            for name in names:
                for number, way in enumerate(WAYS):
                    cases.append(case(spark, name, way, number))
                    say("  ".join(cells_of(cases[-1])))
    finally:
        spark.stop()
    return cases


def case(spark: SparkSession, name: str, way: str, number: int) -> Case:
    """Run one query one way; its system message names the way."""
    system = f"system => 'You are a data analyst. You answer briefly. Run {number}.', max_tokens =>"
    sql = paper.QUERIES[name].sql.replace("max_tokens =>", system)
    with settings(spark, WAYS[way]):
        started = time.monotonic()
        found = spark.sql(sql).collect()
        seconds = time.monotonic() - started
    report = spark_llm.last_report(spark)
    assert report is not None
    return Case(
        query=name,
        way=way,
        rows=report.rows,
        calls=report.calls,
        duplicates=report.duplicates,
        seconds=seconds,
        call_seconds=report.seconds,
        computed_tokens=report.computed_tokens,
        output_tokens=report.output_tokens,
        hits=hits_of(report),
        answers=sorted(str(row[0]) for row in found),
    )


HEADER = (
    "query", "way", "rows", "calls", "prompt tokens", "computed", "answer tokens", "PHR", "data", "seconds", "of calls",
)  # fmt: skip


def cells_of(found: Case) -> tuple[str, ...]:
    """One line of the table."""
    return (
        found.query,
        found.way,
        f"{found.rows:,}",
        f"{found.calls:,}",
        f"{found.hits.tokens:,}",
        f"{found.computed_tokens:,}",
        f"{found.output_tokens:,}",
        f"{found.hits.rate:.1%}",
        f"{found.hits.data_rate:.1%}",
        f"{found.seconds:.1f}",
        f"{found.call_seconds:.1f}",
    )


@dataclass(frozen=True)
class Ratios:
    """How many times less ours takes than another way: seconds of the query, of its calls, tokens computed."""

    seconds: float
    call_seconds: float
    tokens: float


def ratios(cases: Sequence[Case], way: str) -> dict[str, Ratios]:
    """``way`` over ours, by query."""
    by_way = {(found.query, found.way): found for found in cases}
    return {
        query: Ratios(
            seconds=other.seconds / ours.seconds,
            call_seconds=other.call_seconds / max(ours.call_seconds, 1e-9),
            tokens=other.computed_tokens / max(ours.computed_tokens, 1),
        )
        for (query, name), ours in by_way.items()
        if name == OURS and (other := by_way.get((query, way))) is not None
    }


def report(record: Mapping[str, Any]) -> str:
    """The table, the ratios by query, and the targets, from the JSON record."""
    cases = from_record(record)
    lines = [aligned([HEADER, *map(cells_of, cases)]), ""]
    head = ("query", "times less than", "seconds", "of calls", "tokens computed")
    table = [
        (query, way, f"{ratio.seconds:.2f}", f"{ratio.call_seconds:.2f}", f"{ratio.tokens:.2f}")
        for query in dict.fromkeys(found.query for found in cases)
        for way in (NONE, STORED)
        if (ratio := ratios(cases, way).get(query)) is not None
    ]
    return "\n".join([*lines, aligned([head, *table]), "", *targets(cases)])


def targets(cases: Sequence[Case]) -> list[str]:
    """Medians over the filter queries."""
    lines = []
    for way, wanted in ((NONE, 3.0), (STORED, 2.0)):
        found = [ratio for query, ratio in ratios(cases, way).items() if paper.QUERIES[query].kind == "T1"]
        for what in ("seconds", "call_seconds", "tokens") if found else ():
            median = statistics.median(getattr(ratio, what) for ratio in found)
            name = {"seconds": "seconds", "call_seconds": "seconds of calls", "tokens": "tokens computed"}[what]
            lines.append(judge(f"filter queries, median: {name} of {way} against ours", median, wanted))
    return lines


def from_record(record: Mapping[str, Any]) -> list[Case]:
    """The cases of a JSON record."""
    return [Case(**{**entry, "hits": Hits(**entry["hits"])}) for entry in record["queries"]]


def as_record(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(found) for found in cases]
