"""How many partitions a call's rows go to, and by what: ReorderRows' arithmetic (CONTRACTS.md 8 and 9)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.optimizer.reorder.ranges import choose_cuts
from spark_llm.optimizer.rules.calls import Call
from spark_llm.optimizer.statistics import InputStatistics

ENGINE_SECONDS = 60.0  # of work in a partition: what a lost task loses
_MOST_PARTITIONS = 10_000
_FEW_ROWS = 8
_UNIQUE = 0.98  # distinct values a row from which nothing is expected to meet


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """``count`` partitions, 0: no exchange. table: the encoded order table by which a Python function places rows;
    None: rows are sorted by their columns and hashed by the first. cuts: of the ranges that the rows are placed in
    (``choose_cuts``). why: for EXPLAIN."""

    count: int
    why: str
    table: bytes | None = None
    cuts: bytes = b""


def partitioning(call: Call, context: Context, asked_for: bool) -> Partitioning:
    """The partitioning of the rows below ``call``. asked_for: the user chose the one that they have."""
    layout = call.spec.prompt
    table = context.tables.get(layout.table) if layout is not None and layout.table is not None else None
    if asked_for:
        return Partitioning(0, "sorted in the partitions that the query asks for", table)
    known = context.statistics.of(call, context)
    work = None if known.rows is None else _tokens(call, known, context)
    if reason := _no_exchange(call, known, work, context):
        return Partitioning(0, f"sorted in their partitions: {reason}", table)
    count = _count(known, work, context)
    if (
        count > 1
        and known.hashes is not None
        and len(known.hashes)
        and len(call.fields) > 1
        and _leads_with_field(call)
    ):
        placed_by = OrderTable.decode(table) if table is not None else OrderTable.fixed(_order(call))
        cuts = _cuts(known, placed_by, count)
        return Partitioning(count, f"sorted in {count} ranges of equal work", placed_by.encode(), cuts)
    return Partitioning(count, f"sorted in {count} partitions by {_lead_name(call)}", table)


def _cuts(known: InputStatistics, table: OrderTable, count: int) -> bytes:
    assert known.hashes is not None
    assert known.lengths is not None
    key = table.place(known.hashes).key
    lengths = np.take_along_axis(known.lengths, table.orders(known.hashes), axis=1)
    beyond = lengths[:, key.shape[1] :].sum(axis=1)
    lengths = lengths[:, : key.shape[1]].copy()
    lengths[:, -1] += beyond
    return choose_cuts(key, lengths, count)


def _order(call: Call) -> Sequence[int]:
    layout = call.spec.prompt
    return layout.fields if layout is not None and layout.fields else range(len(call.fields))


def _leads_with_field(call: Call) -> bool:
    layout = call.spec.prompt
    return bool(call.fields) and (call.has_constant_prompt or (layout is not None and layout.instruction_last))


def _lead_name(call: Call) -> str:
    """What the rows are hashed by, in words: the first thing of a prompt that is not constant."""
    if not _leads_with_field(call):
        return "their prompt"
    names = [call.names[number] for number in _order(call) if not call.fields[number].foldable()]
    return names[0] if names else "their prompt"


def _tokens(call: Call, known: InputStatistics, context: Context) -> float:
    """About the tokens of all rows' prompts, none of them shared."""
    assert known.rows is not None
    fields = known.row_length
    per_row = 64.0 * len(call.fields) if fields is None else fields
    if not call.has_constant_prompt:
        per_row += 64.0 if known.prompt is None or known.prompt.length is None else known.prompt.length
    return known.rows * per_row


def _no_exchange(call: Call, known: InputStatistics, work: float | None, context: Context) -> str | None:
    if context.partitions:
        return None
    if known.rows is not None and known.rows <= _FEW_ROWS:
        return f"there are {known.rows} rows"
    budget = context.tokens_per_second * ENGINE_SECONDS
    if known.partitions == 1 and (context.slots == 1 or (work is not None and work <= 2 * budget)):
        return "there is one partition"
    distinct = [column.distinct for column in (*known.columns, *([known.prompt] if known.prompt else []))]
    if known.rows and known.partitions and all(d is not None and d >= _UNIQUE * known.rows for d in distinct):
        needed = 1 if work is None else math.ceil(work / budget)
        if known.partitions >= max(context.slots, needed):
            return "no value repeats"
    return None


def _count(known: InputStatistics, work: float | None, context: Context) -> int:
    if context.partitions:
        return context.partitions
    if known.rows is None or work is None:
        return max(context.slots, known.partitions or 0)
    needed = min(_MOST_PARTITIONS, math.ceil(work / (context.tokens_per_second * ENGINE_SECONDS)))
    return max(1, min(max(context.slots, needed), known.rows // 4))
