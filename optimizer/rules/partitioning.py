"""How many partitions a call's rows go to, and by which key: ReorderRows' arithmetic (CONTRACTS.md 8 and 9)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.optimizer.rules.calls import Call
from spark_llm.optimizer.statistics import InputStatistics

ENGINE_SECONDS = 60.0  # of work in a partition: what a lost task loses
_FEW_ROWS = 8
_SKEWED = 1.5  # rows of a value, in partitions, from which they are spread
_MOST_SPREAD = 64  # values
_LEAST_TOGETHER = 64  # rows of a value that stay together: each place computes their prefix anew
_UNIQUE = 0.98  # distinct values a row from which nothing is expected to meet


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """``count`` partitions, 0: no exchange. table: the encoded order table whose groups are the keys, None: the key is
    the first column. spread: (places, hashes) of leading cells (with ``table``: of its keys) whose rows are too many
    for one partition and go to that many places. why: for EXPLAIN."""

    count: int
    why: str
    table: bytes | None = None
    spread: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def expressions(self, columns: Sequence[Expression], catalyst: Catalyst) -> list[Expression]:
        """What the exchange hashes, from the columns that the rows are sorted by."""
        make, first = catalyst.expressions, columns[0]
        if self.table is not None:
            lead = found = make.Substring(first, catalyst.number(1), catalyst.number(8))
            rest = make.XxHash64(catalyst.seq([first]))
        else:
            lead, found = first, make.XxHash64(catalyst.seq([first]))
            rest = make.XxHash64(catalyst.seq(columns[1:])) if len(columns) > 1 else None
        if not self.spread or rest is None:
            return [lead]
        place = catalyst.long(0)
        for places, hashes in self.spread:
            values = [self._literal(hashed, catalyst) for hashed in hashes]
            is_one = make.In(found, catalyst.seq(values))
            place = make.If(is_one, catalyst.modulo(rest, places), place)
        return [lead, place]

    def _literal(self, hashed: int, catalyst: Catalyst) -> Expression:
        if self.table is not None:
            return catalyst.binary(hashed.to_bytes(8, "big"))
        return catalyst.long(np.uint64(hashed).astype(np.int64).item())


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
    order_table = OrderTable.decode(table) if table is not None else OrderTable.fixed(_order(call))
    spread = _spread(call, known, order_table, count, keyed=table is not None)
    by = "group or first field" if table is not None else _lead_name(call)
    heavy = sum(len(hashes) for _, hashes in spread)
    also = f", {heavy} heavy ones spread" if heavy else ""
    return Partitioning(count, f"sorted in {count} partitions by {by}{also}", table, spread)


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
        return max(context.slots, known.partitions or int(context.session.sessionState().conf().numShufflePartitions()))
    needed = math.ceil(work / (context.tokens_per_second * ENGINE_SECONDS))
    return max(1, min(max(context.slots, needed), known.rows // 4))


def _spread(
    call: Call, known: InputStatistics, table: OrderTable, count: int, keyed: bool
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Leading cells with more rows than a partition should have, by the number of places that they go to."""
    hashes = known.hashes
    if hashes is None or known.rows is None or not len(hashes) or count < 2 or not _leads_with_field(call):
        return ()
    leads = table.place(hashes).lead if keyed else hashes[:, _order(call)[0]]
    values, sampled = np.unique(leads, return_counts=True)
    rows = sampled * (known.rows / len(hashes))
    heavy = np.flatnonzero(rows > _SKEWED * known.rows / count)
    heavy = heavy[np.argsort(-rows[heavy], kind="stable")][:_MOST_SPREAD]
    by_places: dict[int, list[int]] = {}
    for one in heavy.tolist():
        places = min(rows[one] * count / known.rows, rows[one] / _LEAST_TOGETHER)
        if places >= 2:
            by_places.setdefault(1 << int(math.log2(places)), []).append(int(values[one]))
    return tuple((places, tuple(found)) for places, found in sorted(by_places.items()))
