"""What the prompts that really reach the engines of a Spark query share, by partitions. No model runs.

The query runs as any other: rules, exchange, the UDF's rendering and windows. In place of the engine stands a counter
in each task, with a prefix cache of its own and without bound, as an engine would have that serves this task alone.
"""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from prefix_order_hits import Hits, common, demo_pipeline
from prefix_order_solver import ANY_INSTRUCTION, SAME_TABLE, tables
from results import aligned, judge
from sortedcontainers import SortedDict

import spark_llm
from spark_llm.datasets import paper
from spark_llm.engine.service.protocol import ANSWER_SCHEMA, StreamOpen
from spark_llm.engine.text.pipeline import TextPipeline

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_llm.report import Report, ReportSink

PARTITIONS = (1, 2, 8, 32, 200)
RANDOM, OURS = "random partitions, sorted", "our plan"


@dataclass(frozen=True)
class Case:
    """One table through Spark. tasks: partitions that had rows, or as many as could have. seconds: of the query."""

    table: str
    plan: str
    partitions: int
    rows: int
    calls: int
    seconds: float
    hits: Hits


def run(
    names: Sequence[str],
    rows: int | None,
    data: Path | None,
    partitions: Sequence[int],
    say: Callable[[str], None],
) -> list[Case]:
    """All tables with both plans and each number of partitions."""
    spark = session()
    cases = []
    with tempfile.TemporaryDirectory() as folder, counting(spark):
        for name, frame in tables(names, rows, data):
            path = str(Path(folder) / name.replace(" ", "_"))
            shuffled = frame.sample(frac=1, random_state=1)
            spark.createDataFrame(shuffled).repartition(4).write.parquet(path)
            for count in partitions:
                for plan in (RANDOM, OURS):
                    cases.append(case(spark, name, path, plan, count))
                    say("  ".join(cells_of(cases[-1])))
    spark.stop()
    return cases


def session() -> SparkSession:
    """A local session whose workers find this module."""
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    spark = spark_llm.session(
        "local[2]",
        progress="false",
        conf={"spark.ui.enabled": "false", "spark.driver.memory": "2g", "spark.sql.adaptive.enabled": "true"},
    )
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def case(spark: SparkSession, name: str, path: str, plan: str, partitions: int) -> Case:
    """Ask about each row of a table once. Random partitions are what a user's ``repartition`` makes."""
    known = SAME_TABLE.get(name, name)
    instruction = paper.instruction(known) if known in paper.TABLES else ANY_INSTRUCTION
    table = spark.read.parquet(path)
    (table.repartition(partitions) if plan == RANDOM else table).createOrReplaceTempView("asked")
    spark.conf.set("spark.llm.optimizer.reorderRows.partitions", str(partitions))
    fields = ", ".join(f"`{column}`" for column in table.columns)
    text = instruction.replace("'", "\\'")
    started = time.monotonic()
    spark.sql(f"SELECT count(llm('{text}', {fields}, max_tokens => 1)) FROM asked").collect()
    seconds = time.monotonic() - started
    report = spark_llm.last_report(spark)
    assert report is not None
    assert not report.failed, report.errors
    return Case(name, plan, partitions, report.rows, report.calls, seconds, hits_of(report))


def hits_of(report: Report) -> Hits:
    """The hits that a query's report tells."""
    return Hits(
        rows=report.calls,
        tokens=report.prompt_tokens,
        instruction_tokens=report.instruction_tokens,
        found=report.cached_tokens,
        instruction_found=report.cached_instruction_tokens,
    )


def counting(spark: SparkSession) -> Any:
    """A context in which the session's calls reach counters instead of engines."""
    from pyspark.sql.functions import pandas_udf

    from spark_llm import report
    from spark_llm.functions.registry import Registry

    sink = report.install(spark).sink

    def make(order_tables: Mapping[str, bytes], calls: int) -> Any:
        assert not calls, "these queries have one call each"
        known = dict(order_tables)

        def llm(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
            from prefix_order_spark import counted

            yield from counted(batches, sink, known)

        llm.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
        return pandas_udf(llm, "string")

    return Registry.of(spark).using(spark, make)


def counted(
    batches: Iterator[tuple[pd.Series, ...]], sink: ReportSink, order_tables: Mapping[str, bytes]
) -> Iterator[pd.Series]:
    """In a task: the real UDF, with a counter where it would connect to its engine."""
    from spark_llm import udf

    real = udf.client.connect
    udf.client.connect = lambda spec, start_timeout=0.0: Counter()  # type: ignore[assignment,return-value]
    try:
        yield from udf.answer_task(batches, sink, order_tables)
    finally:
        udf.client.connect = real  # Spark uses a worker again


class Counter:
    """Stands where an engine's client does; its streams answer every row with nothing but counts."""

    def stream(self, header: StreamOpen) -> CountingStream:
        return CountingStream(header)


class CountingStream:
    """Counts of a prefix cache without bound that sees this stream alone."""

    def __init__(self, header: StreamOpen) -> None:
        self._header = header
        self._seen: SortedDict = SortedDict()  # prompt as bytes that sort as its ids do -> its ids
        self._answers: deque[pa.RecordBatch] = deque()

    def send(self, batch: pa.RecordBatch) -> None:
        prompts, instruction = pipeline().encode(self._header, batch)
        answers = []
        for number, ids, first in zip(batch["id"].to_pylist(), prompts, instruction.tolist(), strict=True):
            key = ids.astype(">i4").tobytes()
            place = self._seen.bisect_left(key)
            beside = [self._seen.peekitem(index)[1] for index in (place - 1, place) if 0 <= index < len(self._seen)]
            found = min(max((common(other, ids) for other in beside), default=0), len(ids) - 1)
            self._seen[key] = ids
            answers.append(
                {
                    "id": number,
                    "text": "x",
                    "finish_reason": "stop",
                    "error": None,
                    "prompt_tokens": len(ids),
                    "instruction_tokens": first,
                    "cached_tokens": found,
                    "cached_instruction_tokens": min(found, first),
                    "computed_tokens": len(ids) - found,
                    "recomputed_tokens": 0,
                    "output_tokens": 1,
                    "folded": False,
                    "stored": False,
                }
            )
        self._answers.append(pa.RecordBatch.from_pylist(answers, ANSWER_SCHEMA))

    def receive(self) -> pa.RecordBatch:
        if not self._answers:
            threading.Event().wait()  # the UDF asks only where rows are open
        return self._answers.popleft()

    def close(self) -> None:
        self._seen.clear()


@functools.cache
def pipeline() -> TextPipeline:
    """The demo model's, once in a worker."""
    return demo_pipeline()


HEADER = ("table", "plan", "partitions", "rows", "calls", "tokens/row", "PHR", "data", "instruction", "query s")


def cells_of(found: Case) -> tuple[str, ...]:
    """One line of the table."""
    return (
        found.table,
        found.plan,
        str(found.partitions),
        f"{found.rows:,}",
        f"{found.calls:,}",
        f"{found.hits.tokens / max(1, found.hits.rows):,.0f}",
        f"{found.hits.rate:.1%}",
        f"{found.hits.data_rate:.1%}",
        f"{found.hits.instruction_rate:.1%}",
        f"{found.seconds:.1f}",
    )


def as_record(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(found) for found in cases]


def report(record: Mapping[str, Any]) -> str:
    """The table, what each number of partitions costs, and the targets, from the JSON record."""
    cases = [Case(**{**entry, "hits": Hits(**entry["hits"])}) for entry in record["spark"]]
    return "\n".join([aligned([HEADER, *map(cells_of, cases)]), "", *targets(cases)])


def targets(cases: Sequence[Case]) -> list[str]:
    """Points of PHR that partitions cost our plan, against one partition."""
    lines = []
    ours = {(found.table, found.partitions): found for found in cases if found.plan == OURS}
    for (name, partitions), found in ours.items():
        whole = ours.get((name, 1))
        if whole is not None and partitions > 1:
            lost = float(np.round(100 * (whole.hits.rate - found.hits.rate), 1))
            lines.append(judge(f"{name}, {partitions} partitions: points of PHR lost", lost, 2.0, below=True))
    return lines
