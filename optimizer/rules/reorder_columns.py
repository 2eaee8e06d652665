"""Fields that repeat stand first in the prompt.

before                                                after
------                                                -----
llm({"fields":["id","quote","plot"]}, 'p', ...)       llm({..., "prompt":{"fields":[2,1,0],
                                                           "fields_why":"plot, quote, id; 4,866 rows; ..."}}, 'p', ...)

The arguments stay where they are; the spec gets the query's order table, from which each task makes every row's order
(a pure function of the row's arguments: CONTRACTS.md 1). It comes from the catalog's statistics (``ANALYZE TABLE``),
else from a job over hashes of the call's input where that is cheap, else from the plan and the types. Heavy
(field, value) groups get an order of their own where that shares more. Calls over the same fields get the same order.

This is a prompt rule: it changes what the model reads (``spark.llm.optimizer.mayChangePrompts``); a call's
``order => 'as_written'`` keeps it away.
"""

from __future__ import annotations

import dataclasses
import hashlib

import msgspec

from spark_llm.call import CallSpec, PromptPlan
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.reorder.counts import order_by_counts
from spark_llm.optimizer.reorder.order_table import Group, OrderTable
from spark_llm.optimizer.reorder.plan_order import plan_order
from spark_llm.optimizer.rules.calls import Call, all_calls, change_specs, decided_calls, function_for
from spark_llm.optimizer.statistics import InputStatistics
from spark_llm.optimizer.statistics.guess import thumb_order

_GAIN = 0.002  # share of field tokens below which an order other than the written one is not worth it


@dataclasses.dataclass(frozen=True)
class FieldOrder:
    """What was decided for calls over fields of these names, in the order of ``names``."""

    names: tuple[str, ...]
    table: OrderTable
    why: str

    def of(self, call: Call) -> OrderTable:
        """The same order table in the numbers of ``call``'s fields."""
        if call.names == self.names:
            return self.table
        number = {name: call.names.index(name) for name in self.names}
        to = [number[name] for name in self.names]
        groups = [
            Group(group.parent, to[group.field], group.hash, tuple(to[field] for field in group.order))
            for group in self.table.groups
        ]
        return OrderTable([to[field] for field in self.table.default_order], groups)


def reorder_columns(plan: Node, context: Context) -> Node:
    """Give each call of ``plan`` that has several fields its order table."""
    if not context.may_change_prompts or plan.isStreaming():
        return plan
    calls = [call for call in all_calls(plan, context.catalyst) if _is_open(call)]
    if not calls:
        return plan
    orders: dict[tuple[str, ...], FieldOrder] = {}
    for call in decided_calls(plan, context.catalyst):
        if len(call.fields) > 1 and (before := _decided_before(call, context)) is not None:
            orders.setdefault(_key(call), before)
    for call in calls:
        if _key(call) not in orders:
            orders[_key(call)] = _decide(call, context)

    def changed(call: Call) -> CallSpec:
        if not _is_open(call):
            return call.spec
        decided = orders[_key(call)]
        return msgspec.structs.replace(call.spec, prompt=_layout(call, decided, context))

    return change_specs(plan, context.catalyst, changed, lambda specs, is_group: function_for(specs, is_group, context))


def _is_open(call: Call) -> bool:
    is_decided = call.spec.prompt is not None and bool(call.spec.prompt.fields_why)
    return len(call.fields) > 1 and call.spec.order != "as_written" and not is_decided


def _key(call: Call) -> tuple[str, ...]:
    """Calls over fields of the same names share their order, however they list them; unless a name stands twice."""
    names = call.names
    return tuple(sorted(names)) if len(set(names)) == len(names) else names


def _decided_before(call: Call, context: Context) -> FieldOrder | None:
    """What a call's spec says that was decided for its fields; None if nothing was."""
    prompt = call.spec.prompt
    if prompt is None or not prompt.fields_why:
        return None
    if prompt.table is not None:
        encoded = context.tables.get(prompt.table)
        return None if encoded is None else FieldOrder(call.names, OrderTable.decode(encoded), prompt.fields_why)
    order = prompt.fields or range(len(call.fields))
    return FieldOrder(call.names, OrderTable.fixed(order), prompt.fields_why)


def _layout(call: Call, decided: FieldOrder, context: Context) -> PromptPlan:
    table = decided.of(call)
    order = () if table.default_order == tuple(range(len(call.fields))) else table.default_order
    digest = None
    if table.num_groups:
        encoded = table.encode()
        digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
        context.tables[digest] = encoded
    layout = call.spec.prompt or PromptPlan()
    return msgspec.structs.replace(layout, fields=order, table=digest, fields_why=decided.why)


def _decide(call: Call, context: Context) -> FieldOrder:
    known = context.statistics.of(call, context)
    if known.hashes is not None and known.lengths is not None:
        return _by_sample(call, known)
    counts = [(column.distinct, column.length) for column in known.columns]
    if known.rows is not None and all(distinct and length for distinct, length in counts):
        return _by_counts(call, known)
    order = thumb_order(call.fields, known.columns)
    return FieldOrder(call.names, OrderTable.fixed(order), _why(call, order, known, "by rule of thumb"))


def _by_sample(call: Call, known: InputStatistics) -> FieldOrder:
    assert known.hashes is not None
    assert known.lengths is not None
    written = range(len(call.fields))
    if len(known.hashes) < 2:
        return FieldOrder(call.names, OrderTable.fixed(written), _why(call, written, known, "as written"))
    decision = plan_order(
        known.hashes,
        known.lengths,
        total_rows=known.rows,
        distinct=[column.distinct for column in known.columns],
    )
    table, shares = decision.table, f"{decision.hits:.0%} of their tokens shared"
    if decision.hits <= decision.written_hits + _GAIN:
        table, shares = OrderTable.fixed(written), f"as written, {decision.written_hits:.0%} of their tokens shared"
    else:
        shares += f" (as written {decision.written_hits:.0%})"
    if table.num_groups:
        shares += f"; {table.num_groups:,} groups of rows have orders of their own"
    return FieldOrder(call.names, table, _why(call, table.default_order, known, shares))


def _by_counts(call: Call, known: InputStatistics) -> FieldOrder:
    assert known.rows is not None
    distinct = [column.distinct or 1 for column in known.columns]
    lengths = [column.length or 1.0 for column in known.columns]
    order, hits = order_by_counts(known.rows, distinct, lengths, [column.table for column in known.columns])
    return FieldOrder(
        call.names, OrderTable.fixed(order), _why(call, order, known, f"{hits:.0%} of their tokens shared")
    )


def _why(call: Call, order: object, known: InputStatistics, shares: str) -> str:
    assert isinstance(order, tuple | list | range)
    names = [call.names[number] for number in order]
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"{listed}: {shares}, by {known.source}"
