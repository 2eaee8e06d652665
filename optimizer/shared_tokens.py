"""What share of a call's prompts the prefix cache is expected to find, as far as rows or columns were counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spark_llm.call import CallSpec, PromptPlan
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.cost import NONE, UNKNOWN, Number, Source, about
from spark_llm.optimizer.reorder.counts import order_by_counts
from spark_llm.optimizer.reorder.expected import Sample, numbered
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.optimizer.rules.calls import Call
from spark_llm.optimizer.statistics import InputStatistics
from spark_llm.optimizer.statistics.values import Hashes


def shared_tokens(
    call: Call, statistics: InputStatistics, source: Source, before: Sequence[CallSpec], context: Context
) -> Number:
    """The share of the tokens of a call's fields that a prefix cache finds, 0 to 1, whole cells.

    before: the calls that are evaluated before it.
    """
    if not call.fields:
        return NONE
    if any(_has_computed(earlier, call.spec) for earlier in before):
        return about(1, source)
    if not call.has_constant_prompt and not (call.spec.prompt or PromptPlan()).instruction_last:
        return UNKNOWN
    order = _order(call)
    if statistics.hashes is not None and statistics.lengths is not None and statistics.rows:
        sampled = Sample(_cells(statistics.hashes), statistics.lengths, max(statistics.rows, len(statistics.hashes)))
        table = _table(call, context)
        rows = len(statistics.hashes)
        orders = np.broadcast_to(order, (rows, len(order))) if table is None else table.orders(statistics.hashes)
        return about(sampled.hits(orders), source) if rows else NONE
    distinct = [column.distinct for column in statistics.columns if column.distinct]
    lengths = [column.length for column in statistics.columns if column.length]
    if statistics.rows and len(distinct) == len(lengths) == len(order):
        tables = [column.table for column in statistics.columns]
        best, share = order_by_counts(statistics.rows, distinct, lengths, tables)
        if best == order.tolist():
            return about(share, source)
    return UNKNOWN


def _has_computed(earlier: CallSpec, call: CallSpec) -> bool:
    """Has the earlier call read the fields of ``call`` in prompts that begin with them?"""
    one, other = earlier.prompt or PromptPlan(), call.prompt or PromptPlan()
    return (
        one.instruction_last
        and other.instruction_last
        and one.later_calls > other.later_calls
        and (earlier.model, earlier.system) == (call.model, call.system)
        and sorted(field.name for field in earlier.fields) == sorted(field.name for field in call.fields)
    )


def _order(call: Call) -> np.ndarray:
    layout = call.spec.prompt or PromptPlan()
    return np.array(layout.fields or range(len(call.fields)), np.int64)


def _table(call: Call, context: Context) -> OrderTable | None:
    layout = call.spec.prompt
    encoded = context.tables.get(layout.table) if layout is not None and layout.table is not None else None
    return None if encoded is None else OrderTable.decode(encoded)


def _cells(hashes: Hashes) -> np.ndarray:
    """The values by numbers that no two fields have in common."""
    cells, start = np.empty(hashes.shape, np.int64), 0
    for field in range(hashes.shape[1]):
        number, _, counts = numbered(hashes[:, field])
        cells[:, field] = start + number
        start += len(counts)
    return cells
