"""The one door to statistics: which source is used, and what is remembered between queries."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from spark_llm.field_text import FieldRenderer
from spark_llm.optimizer.catalyst.bridge import Expression
from spark_llm.optimizer.statistics.catalog import catalog_statistics, table_sizes
from spark_llm.optimizer.statistics.guess import order_tables
from spark_llm.optimizer.statistics.partitions import num_partitions
from spark_llm.optimizer.statistics.plain import Plain, plain_input
from spark_llm.optimizer.statistics.sample import sample_statistics
from spark_llm.optimizer.statistics.sides import Lead, leading_side
from spark_llm.optimizer.statistics.values import ColumnCounts, InputStatistics

if TYPE_CHECKING:
    from spark_llm.optimizer.catalyst.context import Context
    from spark_llm.optimizer.rules.calls import Call

logger = logging.getLogger("spark_llm.optimizer")

_REMEMBERED_BYTES = 256 << 20  # of samples


class Statistics:
    """Statistics of calls' inputs; those of a job are remembered by the input's plan, so that it runs once for it.

    Thread-safe. max_bytes: a job runs only where the tables below the call are smaller; 0: never.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], InputStatistics | None] = OrderedDict()  # None: the job failed
        self._lock = threading.Lock()
        self.jobs = 0  # how often a job ran

    def of(self, call: Call, context: Context) -> InputStatistics:
        """What is known of the rows that reach ``call``: the catalog's numbers, else a job's, else the plan's."""
        catalyst = context.catalyst
        arguments = [*call.fields, *([] if call.has_constant_prompt else [call.prompt])]
        plain = plain_input(call.node.child(), arguments, context.statistics_bytes, catalyst)
        if plain.plan is None:
            return _nothing(call, plain.refusal or "")
        partitions = num_partitions(plain.plan, context.session, catalyst)
        rows, counts = catalog_statistics(plain.plan, arguments, _labels(call, context), catalyst)
        if rows is not None and all(c.distinct is not None and c.length is not None for c in counts):
            found = InputStatistics("the catalog", rows, *_split(call, counts))
        else:
            sampled = self._by_job(call, arguments, plain, context)
            found = sampled or _by_plan(
                call, plain, rows, counts, leading_side(plain.plan, arguments, context), context
            )
        return dataclasses.replace(found, partitions=partitions)

    def _by_job(
        self, call: Call, arguments: list[Expression], plain: Plain, context: Context
    ) -> InputStatistics | None:
        if not context.statistics_bytes:
            return None
        catalyst = context.catalyst
        projected = catalyst.plans.Project(
            catalyst.seq(catalyst.named(argument, "a") for argument in arguments), plain.plan
        )
        # The same rows are known again below the nodes that other rules have put between.
        rows = catalyst.questions("Inputs").essence(projected)
        application = context.session.sparkContext().applicationId()
        # The sizes tell a table that has grown from the one that was counted.
        sizes = tuple(table_sizes(plain.plan))
        key = (application, rows.semanticHash(), sizes, call.spec.fields, call.spec.model, call.spec.task)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        if plain.refusal is not None or context.explaining:
            return None
        found = None
        try:
            found = sample_statistics(
                plain.plan,
                None if call.has_constant_prompt else call.prompt,
                call.fields,
                call.spec.fields,
                context.lengths(call.spec),
                context.statistics_timeout,
                context.session,
                catalyst,
            )
        except Exception as error:  # a job of ours that fails costs the query an order, nothing else
            if "spark-llm-statistics" in str(error):  # our own tag: cancelled
                seconds = context.statistics_timeout
                logger.warning("The statistics job for %r took over %g s and was cancelled.", call.label, seconds)
            else:
                logger.warning("The statistics job for %r failed.", call.label, exc_info=True)
        with self._lock:
            self.jobs += 1
            self._known[key] = found
            while len(self._known) > 1 and sum(map(_bytes, self._known.values())) > _REMEMBERED_BYTES:
                self._known.popitem(last=False)
        return found


def _bytes(found: InputStatistics | None) -> int:
    arrays = () if found is None else (found.hashes, found.lengths)
    return 4096 + sum(array.nbytes for array in arrays if array is not None)


def _labels(call: Call, context: Context) -> list[float]:
    """Tokens of each column's cell beside its value."""
    texts = [FieldRenderer(spec)("") for spec in call.spec.fields]
    labels = [float(length) for length in context.lengths(call.spec)(texts)] if texts else []
    return labels if call.has_constant_prompt else [*labels, 0.0]


def _nothing(call: Call, why: str) -> InputStatistics:
    return InputStatistics(f"nothing is known: {why}", None, (ColumnCounts(),) * len(call.fields))


def _by_plan(
    call: Call, plain: Plain, rows: int | None, counts: list[ColumnCounts], lead: Lead | None, context: Context
) -> InputStatistics:
    """The plan's own knowledge: which table a field comes from, and which table repeats more.

    lead: of the pairs of a join without an equality.
    """
    assert plain.plan is not None
    if context.explaining:
        why = "no job runs for EXPLAIN"
    elif not context.statistics_bytes:
        why = "spark.llm.optimizer.statistics.enabled is false"
    else:
        why = plain.refusal or "the statistics job failed or took too long"
    ranks = order_tables(plain.plan, table_sizes(plain.plan), context.catalyst)
    if lead is not None:
        why = f"{why}; {lead.why}"
        ranks = [rank if table in lead.tables else rank + len(ranks) for table, rank in enumerate(ranks)]
    ranked = [dataclasses.replace(c, table=None if c.table is None else ranks[c.table]) for c in counts]
    return InputStatistics(f"the plan alone ({why})", rows, *_split(call, ranked))


def _split(call: Call, counts: list[ColumnCounts]) -> tuple[tuple[ColumnCounts, ...], ColumnCounts | None]:
    """Counts of the fields, and of the prompt if it differs by row."""
    fields = len(call.fields)
    return tuple(counts[:fields]), counts[fields] if len(counts) > fields else None
