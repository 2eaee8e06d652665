"""How many rows and how many distinct tuples of columns plans give: counted by one Spark job for all of them.

For rules that compare places of a call in a plan. A plan is run only where a sample of it might be (plain.py), and is
remembered as Spark's optimizer would write it, so that two ways to say the same are counted once.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from spark_llm.optimizer.catalyst.bridge import Expression, Node, frame_of, items
from spark_llm.optimizer.statistics.catalog import table_sizes
from spark_llm.optimizer.statistics.plain import plain_input
from spark_llm.optimizer.statistics.sample import bounded

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from spark_llm.optimizer.catalyst.context import Context

logger = logging.getLogger("spark_llm.optimizer")

_MOST_REMEMBERED = 10_000


class Key(NamedTuple):
    """A tuple of columns; only rows where ``condition`` holds count, None: all."""

    columns: tuple[Expression, ...]
    condition: Expression | None = None


class Question(NamedTuple):
    """How many rows has ``plan``, and how many distinct values each of ``keys`` there?"""

    plan: Node
    keys: tuple[Key, ...]


class Tuples(NamedTuple):
    """rows, and distinct[i] different tuples of key i; row_bytes: of all keys' texts in a row, None: not known.

    is_counted: by a job; else it is Spark's estimate from the catalog.
    """

    rows: int
    distinct: tuple[int, ...]
    row_bytes: float | None
    is_counted: bool


_known: OrderedDict[tuple[object, ...], Tuples | None] = OrderedDict()  # None: the job failed
_lock = threading.Lock()


def count_tuples(questions: list[Question], context: Context) -> list[Tuples] | None:
    """The answers to all questions, counted, else estimated from the catalog; None where one is not known.

    No job runs for EXPLAIN, nor where spark.llm.optimizer.statistics forbids it; what was counted before is known.
    """
    return _counted(questions, context) or _estimated(questions)


def _counted(questions: list[Question], context: Context) -> list[Tuples] | None:
    catalyst = context.catalyst
    if not context.statistics_bytes:
        return None
    asked: list[tuple[tuple[object, ...], DataFrame]] = []
    for plan, keys in questions:
        plain = plain_input(
            plan, [column for key in keys for column in _needed(key)], context.statistics_bytes, catalyst
        )
        if plain.plan is None or plain.refusal is not None or not plain.plan.deterministic():
            return None
        asked.append(_frame(Question(plain.plan, keys), context))
    with _lock:
        missing = {key: frame for key, frame in asked if key not in _known}
    if missing and context.explaining:
        return None
    if missing:
        found = _run(missing, context)
        with _lock:
            _known.update(found)
            while len(_known) > _MOST_REMEMBERED:
                _known.popitem(last=False)
    with _lock:
        answers = [_known.get(key) for key, _ in asked]
    known = [answer for answer in answers if answer is not None]
    return known if len(known) == len(questions) else None


def _needed(key: Key) -> list[Expression]:
    return [*key.columns, *([] if key.condition is None else [key.condition])]


def _frame(question: Question, context: Context) -> tuple[tuple[object, ...], DataFrame]:
    """What the plan is remembered by, and a frame of a hash k<i> for each key and of the bytes of all of them."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    catalyst, make = context.catalyst, context.catalyst.expressions
    entries = []
    for i, (columns, condition) in enumerate(question.keys):
        # A hash skips NULLs: (a, NULL) and (NULL, a) are different.
        parts = [part for column in columns for part in (column, make.IsNull(column))]
        value = make.XxHash64(catalyst.seq(parts))
        if condition is not None:
            value = make.If(condition, value, make.Literal.create(None, catalyst.types.LongType))
        entries.append(catalyst.named(value, f"k{i}"))
    sizes = [
        make.Coalesce(catalyst.seq([make.OctetLength(column), catalyst.number(0)]))
        for key in question.keys
        for column in key.columns
        if not column.foldable() and str(column.dataType().simpleString()) == "string"
    ]
    size = functools.reduce(make.Add, sizes, catalyst.number(0))
    entries.append(catalyst.named(size, "size"))
    plan = catalyst.plans.Project(catalyst.seq(entries), question.plan)
    frame = frame_of(plan, SparkSession(SparkContext.getOrCreate(), context.session), catalyst)
    optimized = frame._jdf.queryExecution().optimizedPlan()
    application = context.session.sparkContext().applicationId()
    # The sizes tell a table that has grown from the one that was counted.
    return (application, optimized.semanticHash(), tuple(table_sizes(question.plan)), len(question.keys)), frame


def _run(frames: dict[tuple[object, ...], DataFrame], context: Context) -> dict[tuple[object, ...], Tuples | None]:
    """Count all frames in one job: one shuffle of the distinct values of all."""
    from pyspark.sql import functions as F

    width = {name: len(frame.columns) - 1 for name, frame in frames.items()}
    parts = [
        frame.select(F.lit(f).alias("f"), F.lit(k).alias("key"), F.col(f"k{k}").alias("value"), "size")
        for f, (name, frame) in enumerate(frames.items())
        for k in range(width[name])
    ]
    values = functools.reduce(lambda one, other: one.union(other), parts).groupBy("f", "key", "value")
    counts = values.agg(F.count(F.lit(1)).alias("rows"), F.sum("size").alias("size")).groupBy("f", "key")
    counts = counts.agg(F.sum("rows").alias("rows"), F.count("value").alias("distinct"), F.sum("size").alias("size"))
    try:
        with bounded(counts, context.statistics_timeout):
            found = {(row.f, row.key): row for row in counts.collect()}
    except Exception as error:  # a job of ours that fails costs the query a better plan, nothing else
        took_long = "spark-llm-statistics" in str(error)  # our own tag: cancelled
        why = f"took over {context.statistics_timeout:g} s and was cancelled" if took_long else "failed"
        logger.warning("The job that counts rows around joins and groups %s.", why, exc_info=not took_long)
        return dict.fromkeys(frames)
    answers: dict[tuple[object, ...], Tuples | None] = {}
    for f, name in enumerate(frames):
        rows = [found.get((f, k)) for k in range(width[name])]
        if (first := rows[0]) is None:  # a plan without rows
            answers[name] = Tuples(0, (0,) * width[name], 0.0, True)
        else:
            distinct = tuple(0 if row is None else int(row.distinct) for row in rows)
            answers[name] = Tuples(int(first.rows), distinct, first.size / first.rows, True)
    return answers


def _estimated(questions: list[Question]) -> list[Tuples] | None:
    """Spark's own estimate, which it has where ANALYZE TABLE ran and spark.sql.cbo.enabled holds."""
    found = []
    for plan, keys in questions:
        statistics = plan.stats()
        if not statistics.rowCount().isDefined():
            return None
        rows = int(str(statistics.rowCount().get()))
        found.append(
            Tuples(rows, tuple(_distinct(key, rows, statistics.attributeStats()) for key in keys), None, False)
        )
    return found


def _distinct(key: Key, rows: int, statistics: Node) -> int:
    """At most as many as the columns have combinations, and as there are rows."""
    combinations = 1
    seen = set()
    for column in (column for argument in key.columns for column in items(argument.references().toSeq())):
        if (identity := int(column.exprId().id())) in seen:
            continue
        seen.add(identity)
        entry = statistics.get(column)
        if not entry.isDefined() or not entry.get().distinctCount().isDefined():
            return rows
        combinations *= max(1, int(str(entry.get().distinctCount().get())))
    return min(rows, combinations)
