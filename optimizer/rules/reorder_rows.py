"""Rows that share a prompt prefix meet in one task and become neighbours there.

before                                          after
------                                          -----
Project [id, pythonUDF0 AS answer]              Project [id, pythonUDF0 AS answer]
+- ArrowEvalPython [llm(.., 'p', plot, n)]      +- Project [id, plot, n, pythonUDF0]
   +- Relation [id, plot, n]                       +- ArrowEvalPython [llm(.., 'p', plot, _llm1)]
                                                      +- Sort [plot ASC, _llm1 ASC], false
                                                         +- RepartitionByExpression [plot], 8
                                                            +- Project [id, plot, n, cast(n as string) AS _llm1]
                                                               +- Relation [id, plot, n]

Where there is a sample of the rows, a Python function gives each row its place in prompt order by the query's order
table, and one of as many ranges of equal work as there are partitions; the exchange hashes that range. Prefixes stay
together at every depth, values with many rows are cut by the rest of their arguments, and equal arguments meet. Without
a sample the exchange hashes the first cell of the prompt. (A range exchange of Spark's would run what stands below it
twice: CONTRACTS.md 7.) The number of partitions is fixed, which keeps adaptive execution from merging them, and comes
from the time that an engine needs. Arguments that are computed are computed once, below.

It keeps out where the order of rows can be seen (order_seen.py) and of embeddings, and makes no exchange where the user
chose the partitions, where there is one partition and little work, or where rows share nothing.
"""

from __future__ import annotations

import dataclasses

import msgspec

from spark_llm.call import RowPlan
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.reorder.ranges import SLOT_BYTES
from spark_llm.optimizer.rules.calls import Call, calls_of, rebuilt, rewrite_below
from spark_llm.optimizer.rules.order_seen import has_order, has_partitions, sees_order
from spark_llm.optimizer.rules.partitioning import Partitioning, partitioning


def reorder_rows(plan: Node, context: Context) -> Node:
    """Place and sort the rows below each llm() call of ``plan``."""
    if plan.isStreaming():
        return plan
    return rewrite_below(
        plan,
        context.catalyst,
        lambda node, seen: sees_order(node, context.catalyst, seen),
        lambda node, seen: _reordered(node, context, seen),
        False,
    )


def _reordered(node: Node, context: Context, order_seen: bool) -> Node:
    """``node`` over rows in prompt order, or with the reason why not in its spec."""
    catalyst = context.catalyst
    calls = calls_of(node)
    if any(call.spec.rows is not None and call.spec.rows.order_why for call in calls):
        return node
    if all(call.spec.task == "embed" for call in calls):
        return _noted(node, calls, RowPlan(order_why="as they come: texts to embed share no prefix"), catalyst)
    keys = _keys(calls, catalyst)
    if not keys or not all(key.deterministic() for key in keys):
        return node
    child = node.child()
    if order_seen:
        return _noted(node, calls, RowPlan(order_why="as they come: their order can be seen above"), catalyst)
    if has_order(child, catalyst):
        return _noted(node, calls, RowPlan(order_why="as they come: they are sorted below"), catalyst)
    if _is_placed_alike(child, calls, catalyst):
        return _noted(node, calls, RowPlan(order_why="as the call below has them", is_sorted=True), catalyst)
    parts = partitioning(calls[0], context, asked_for=has_partitions(child, catalyst))
    return _placed(node, calls, keys, parts, context)


def _noted(node: Node, calls: list[Call], rows: RowPlan, catalyst: Catalyst) -> Node:
    return rebuilt(node, [_with_rows(call, rows) for call in calls], catalyst)


def _with_rows(call: Call, rows: RowPlan) -> Call:
    old = call.spec.rows or RowPlan()
    rows = msgspec.structs.replace(rows, fold=old.fold, fold_why=old.fold_why)
    return dataclasses.replace(call, spec=msgspec.structs.replace(call.spec, rows=rows))


def _placed(node: Node, calls: list[Call], keys: list[Expression], parts: Partitioning, context: Context) -> Node:
    """The call over an exchange (where ``parts`` has one) and a local sort."""
    catalyst = context.catalyst
    output, child = node.output(), node.child()
    aliases = {i: catalyst.named(key, f"_llm{i}") for i, key in enumerate(keys) if not catalyst.is_attribute(key)}
    if aliases:
        child = catalyst.plans.Project(child.output().concat(catalyst.seq(aliases.values())), child)
    columns = [aliases[i].toAttribute() if i in aliases else key for i, key in enumerate(keys)]
    calls = _over(calls, keys, columns, catalyst)
    hashed = columns[:1]
    if parts.table is not None:
        key = catalyst.named(catalyst.expressions.Literal.create(None, catalyst.types.BinaryType), "_llm_place")
        place = context.place(parts.table, parts.cuts, parts.count)
        udf = catalyst.expressions.PythonUDF(
            "llm_place",
            place.func(),
            place.dataType(),
            catalyst.seq(calls[0].fields),
            place.pythonEvalType(),
            True,
            key.exprId(),
        )
        attribute = key.toAttribute()
        child = catalyst.plans.ArrowEvalPython(
            catalyst.seq([udf]), catalyst.seq([attribute]), child, place.pythonEvalType()
        )
        # The function knows fields only; and its first bytes are those that the exchange hashes.
        columns = [attribute, *(call.prompt for call in calls if not call.has_constant_prompt)]
        hashed = [catalyst.expressions.Substring(attribute, catalyst.number(1), catalyst.number(SLOT_BYTES))]
    why = parts.why
    if parts.count:
        if calls[0].pair is not None:  # one match of a left row is enough, wherever its pairs stand in prompt order
            hashed, why = [calls[0].pair], f"sorted in {parts.count} partitions of whole left rows"
        elif left := _left(calls[0]):  # its pairs share prompts
            places = [number for number in catalyst.numbered([*keys, *left])[len(keys) :] if number >= 0]
            hashed = [aliases[i].toAttribute() if i in aliases else keys[i] for i in places] or hashed
            why = f"sorted in {parts.count} partitions of whole left rows"
        child = catalyst.repartition(hashed, child, parts.count)
    child = catalyst.plans.Sort(catalyst.seq(map(catalyst.ascending, columns)), False, child, catalyst.none)
    rows = RowPlan(order_why=why, is_sorted=True, partitions=parts.count)
    call_node = rebuilt(node, [_with_rows(call, rows) for call in calls], catalyst, child)
    return catalyst.plans.Project(output, call_node) if aliases or parts.table is not None else call_node


def _over(calls: list[Call], keys: list[Expression], columns: list[Expression], catalyst: Catalyst) -> list[Call]:
    """The calls with ``columns`` instead of arguments that are equal to ``keys``."""
    arguments = [argument for call in calls for argument in (call.prompt, *call.fields)]
    numbers = catalyst.numbered([*keys, *arguments])[len(keys) :]
    found = iter(columns[n] if n >= 0 else argument for n, argument in zip(numbers, arguments, strict=True))
    return [
        dataclasses.replace(call, prompt=next(found), fields=tuple(next(found) for _ in call.fields)) for call in calls
    ]


def _left(call: Call) -> list[Expression]:
    """The fields of the left row whose pairs share prompts; none where they do not."""
    layout = call.spec.prompt
    return [call.fields[number] for number in layout.left] if layout is not None and layout.rows else []


def _keys(calls: list[Call], catalyst: Catalyst) -> list[Expression]:
    """What the prompts depend on, row by row, in the order in which the first call's prompts have it: each once."""
    arguments: list[Expression] = []
    for call in calls:
        layout = call.spec.prompt
        order = layout.fields if layout is not None and layout.fields else range(len(call.fields))
        fields = [call.fields[number] for number in order]
        is_last = layout is not None and layout.instruction_last
        arguments += [*fields, call.prompt] if is_last else [call.prompt, *fields]
    return [arguments[i] for i, number in enumerate(catalyst.numbered(arguments)) if number == i]


def _is_placed_alike(node: Node, calls: list[Call], catalyst: Catalyst) -> bool:
    """Does a call below have its rows in the order that these calls want (two questions over the same fields)?

    Its arguments, or theirs, may be columns of a Project; what they stand for counts.
    """
    above = node
    while not catalyst.is_call(node):
        if node.nodeName() not in ("Project", "Filter", "BatchEvalPython"):
            return False
        node = node.child()
    below = calls_of(node)
    if not all(call.spec.rows is not None and call.spec.rows.is_sorted for call in below):
        return False
    wanted = [catalyst.traced(key, above) for key in _keys(calls, catalyst)]
    theirs = [catalyst.traced(key, node) for key in _keys(below, catalyst)]
    tables = [call.spec.prompt.table if call.spec.prompt is not None else None for call in (calls[0], below[0])]
    return (
        tables[0] == tables[1]
        and len(theirs) == len(wanted)
        and all(a.semanticEquals(b) for a, b in zip(theirs, wanted, strict=True))
    )
