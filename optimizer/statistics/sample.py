"""Statistics by a Spark job: how many rows and distinct values there are, and hashes and lengths of some rows.

Texts stay in the executors but for the beginnings of some, which tell how many tokens a byte makes.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from spark_llm.call import FieldSpec
from spark_llm.field_text import FieldRenderer, instruction_line
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Jvm, Node, frame_of
from spark_llm.optimizer.statistics.plain import size_of
from spark_llm.optimizer.statistics.values import ColumnCounts, Floats, InputStatistics

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

SAMPLE_ROWS = 20_000
_LEAST_ROWS = 1000  # and no fewer where there are many columns
_MOST_CELLS = 2_000_000  # of a sample
_SMALL = 16 << 20  # bytes of tables of which five samples' rows are fetched without being counted before
_TEXTS = 16  # rows of a partition of which the beginnings of values are tokenised
_BEGINNING = 400  # characters

Lengths = Callable[[Sequence[str]], list[int]]


def sample_statistics(
    plan: Node,
    prompt: Expression | None,
    fields: Sequence[Expression],
    specs: Sequence[FieldSpec],
    lengths: Lengths,
    timeout: float,
    session: Jvm,
    catalyst: Catalyst,
) -> InputStatistics:
    """Run ``plan`` for the statistics of a call's columns. ``prompt``: where it differs by row, else None.

    The sample is the same for the same table in the same partitions. timeout: seconds after which the job is cancelled.
    Raises whatever Spark raises.
    """
    columns = [*fields, *([prompt] if prompt is not None else [])]
    renderers = [FieldRenderer(spec) for spec in specs] + ([instruction_line] if prompt is not None else [])
    frame = _frame(plan, columns, session, catalyst)
    with bounded(frame, timeout):
        rows, distinct, table = _rows(frame, len(columns), size_of(plan) <= _SMALL)
    numbers = range(len(columns))
    cells = [
        _cell_lengths(_numbers(table, f"n{i}"), table.column(f"t{i}").to_pylist(), renderers[i], lengths)
        for i in numbers
    ]
    counts = tuple(
        ColumnCounts(distinct=distinct[i], length=float(cells[i].mean()) if len(cells[i]) else None) for i in numbers
    )
    sampled, width = table.num_rows, len(fields)
    hashes = [_numbers(table, f"h{i}").view(np.uint64) for i in range(width)]
    return InputStatistics(
        source=f"{rows:,} rows" if sampled == rows else f"a sample of {sampled:,} of {rows:,} rows",
        rows=rows,
        columns=counts[:width],
        prompt=counts[width] if prompt is not None else None,
        hashes=np.stack(hashes, axis=1) if width else np.empty((sampled, 0), np.uint64),
        lengths=np.stack(cells[:width], axis=1) if width else np.empty((sampled, 0)),
    )


def _rows(frame: DataFrame, columns: int, is_small: bool) -> tuple[int, list[int], pa.Table]:
    """How many rows there are, how many distinct values each column has, and at most SAMPLE_ROWS of the rows."""
    from pyspark.sql import functions as F

    most = max(_LEAST_ROWS, min(SAMPLE_ROWS, _MOST_CELLS // max(1, columns)))
    if is_small:
        table = _with_few_texts(frame.limit(5 * most + 1), columns).toArrow()
        if (rows := table.num_rows) <= 5 * most:
            distinct = [len(np.unique(_numbers(table, f"h{i}"))) for i in range(columns)]
            if rows > most:
                table = table.take(np.sort(np.random.default_rng(1).choice(rows, most, replace=False)))
            return rows, distinct, table
    counts = [F.approx_count_distinct(f"h{i}", 0.02) for i in range(columns)]
    found = frame.agg(F.count(F.lit(1)), *counts).collect()[0]
    rows = int(found[0])
    sampled = frame.sample(most / rows, seed=1) if rows > most else frame
    return rows, [min(rows, int(count)) for count in found[1:]], _with_few_texts(sampled, columns).toArrow()


def _with_few_texts(frame: DataFrame, columns: int) -> DataFrame:
    """The texts t<i> of the first rows of each partition, NULL in the others."""
    from pyspark.sql import functions as F

    # The lower 33 bits number a partition's rows.
    is_first = F.monotonically_increasing_id().bitwiseAND(F.lit((1 << 33) - 1)) < _TEXTS
    kept = [F.col(f"{name}{i}") for name in "hn" for i in range(columns)]
    return frame.select(*kept, *(F.when(is_first, F.col(f"t{i}")).alias(f"t{i}") for i in range(columns)))


def _frame(plan: Node, columns: Sequence[Expression], session: Jvm, catalyst: Catalyst) -> DataFrame:
    """For each column i its values' hash h<i>, bytes n<i> and beginnings t<i>."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    make, entries = catalyst.expressions, []
    for i, column in enumerate(columns):
        size = make.Coalesce(catalyst.seq([make.OctetLength(column), catalyst.number(4)]))
        beginning = make.Substring(column, catalyst.number(1), catalyst.number(_BEGINNING))
        hashed = make.XxHash64(catalyst.seq([column]))
        entries += [catalyst.named(e, f"{n}{i}") for e, n in ((hashed, "h"), (size, "n"), (beginning, "t"))]
    project = catalyst.plans.Project(catalyst.seq(entries), plan)
    return frame_of(project, SparkSession(SparkContext.getOrCreate(), session), catalyst)


@contextlib.contextmanager
def bounded(frame: DataFrame, timeout: float) -> Iterator[None]:
    """Jobs of the block say in Spark's UI what they are for, and are cancelled after ``timeout`` seconds."""
    context, key = frame.sparkSession.sparkContext, "spark.job.description"
    before, tag = context.getLocalProperty(key), f"spark-llm-statistics-{secrets.token_hex(8)}"
    context.setLocalProperty(key, "spark-llm: statistics for the order of prompts")
    context.addJobTag(tag)
    ended = threading.Event()

    def cancel_when_due() -> None:
        due = ended.wait(timeout)
        while not due:  # again, for a job may begin after another was cancelled
            context.cancelJobsWithTag(tag)
            due = ended.wait(0.1)

    threading.Thread(target=cancel_when_due, name="spark-llm-statistics", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        context.removeJobTag(tag)
        context.setLocalProperty(key, before)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    values: np.ndarray = table.column(name).combine_chunks().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values)


def _cell_lengths(
    sizes: np.ndarray, texts: list[str | None], render: Callable[[str | None], str], lengths: Lengths
) -> Floats:
    """Tokens of each rendered cell, from its value's bytes and what the texts at hand come to."""
    known = [text for text in texts if text]
    label = lengths([render("")])[0]
    per_byte = 0.25
    if known:
        total = sum(lengths([render(text) for text in known])) - label * len(known)
        per_byte = max(0.01, total / sum(len(text.encode()) for text in known))
    return label + per_byte * sizes.astype(np.float64)
