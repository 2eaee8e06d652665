"""LIMIT over a filter on calls: tasks stop asking when the query has its rows (the second half of LimitBeforeCalls).

before                                            after
------                                            -----
GlobalLimit 5                                     GlobalLimit 5
+- LocalLimit 5                                   +- LocalLimit 5
   +- Filter (a = 'x')                               +- Filter (a = 'x')
      +- ArrowEvalPython [llm(.., 'p', t)], [a]         +- Project [t, g.a0 AS a]
         +- Relation [t]                                   +- ArrowEvalPython [llm_group({p; conditions; limit: 5}, ..)]
                                                              +- Relation [t]

The node gets the filter and n. Its tasks ask for their rows in windows that grow 1, 2, 4 ... per query, count the rows
that the filter will keep, and stop when there are n in all; the other rows are NULL, which the filter drops
(CONTRACTS.md 12). Where a conjunct is none that a task can evaluate, hits cannot be counted and windows only grow.

Between limit and filter stands nothing that changes which rows count. A filter that could keep a row with an answer
missing keeps the limit away: then a row that was not asked would come out.
"""

from __future__ import annotations

import dataclasses

import msgspec

from spark_llm.call import Condition
from spark_llm.optimizer.catalyst.bridge import Expression, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, calls_of, rebuilt
from spark_llm.optimizer.rules.conditions import conjuncts, needs_all
from spark_llm.optimizer.rules.groups import Answered, group_node, single_call

NAME = "limitBeforeCalls"

_LIMITS = ("GlobalLimit", "LocalLimit")
# What gives a row for each row that it gets.
_ROW_BY_ROW = {
    "ArrowEvalPython",
    "BatchEvalPython",
    "Project",
    "RebalancePartitions",
    "Repartition",
    "RepartitionByExpression",
    "ResolvedHint",
    "SubqueryAlias",
    "Union",
}


def limit_into_filter(plan: Node, context: Context) -> Node:
    """Tell the calls of ``plan`` that stand under a filter under a limit how many rows the query needs."""
    return plan if plan.isStreaming() else _rewrite(plan, 0, context)


def _rewrite(node: Node, needed: int, context: Context) -> Node:
    """needed: how many of the node's rows the query needs at most, whichever they are; 0: all of them."""
    catalyst = context.catalyst
    if not catalyst.holds_call(node):
        return node
    name = node.nodeName()
    if name == "Filter" and needed and (limited := _limited(node, needed, context)) is not None:
        return limited
    below = 0
    if name in _LIMITS:
        below = min(_rows(node.limitExpr()) or needed, needed or _rows(node.limitExpr()))
    elif name == "Offset":
        below = needed + _rows(node.offsetExpr()) if needed else 0
    elif name in _ROW_BY_ROW and catalyst.is_deterministic(node) and not _has_ranges(node):
        below = needed
    children = items(node.children())
    changed = [_rewrite(child, below, context) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        node = catalyst.with_children(node, changed)
    return node


def _has_ranges(node: Node) -> bool:
    """Is the node an exchange by ranges, for which Spark runs what is below once more?"""
    return node.nodeName() in ("RebalancePartitions", "RepartitionByExpression") and any(
        key.nodeName() == "SortOrder" for key in items(node.partitionExpressions())
    )


def _rows(limit: Expression) -> int:
    return int(limit.value()) if limit.nodeName() == "Literal" and limit.value() is not None else 0


def _limited(top: Node, needed: int, context: Context) -> Node | None:
    """``top``, a Filter, over a node of calls that knows how many rows the query needs; None if there is none."""
    catalyst = context.catalyst
    nodes: list[Node] = []
    bottom = top
    while bottom.nodeName() in ("Filter", "Project") and catalyst.is_deterministic(bottom):
        nodes.append(bottom)
        bottom = bottom.child()
    if not catalyst.is_call(bottom) or bottom.udfs().size() != 1:
        return None
    calls = calls_of(bottom)
    if calls[0].group is None and single_call(bottom, context) is None:
        return None
    conditions, is_all = _conditions(nodes, bottom, calls, context)
    node = _with_limit(bottom, calls, conditions if is_all else [], needed, context)
    if node is None:
        return None
    for old in reversed(nodes):
        node = catalyst.with_children(old, [node])
    return node


def _conditions(nodes: list[Node], bottom: Node, calls: list[Call], context: Context) -> tuple[list[Condition], bool]:
    """What the Filters of ``nodes`` want of the answers; whether that is all, and no row without an answer is kept."""
    catalyst = context.catalyst
    column = bottom.resultAttrs().head()
    answers = [column]
    if calls[0].group is not None:
        answers = [catalyst.expressions.GetStructField(column, call.member, catalyst.none) for call in calls]
    filters = [node for node in nodes if node.nodeName() == "Filter"]
    found = [each for node in filters for each in conjuncts(node, bottom, answers, catalyst)]
    conditions = [each.condition for each in found if each.condition is not None and each.answers]
    return conditions, len(conditions) == len(found) and needs_all(conditions, len(calls))


def _with_limit(
    bottom: Node, calls: list[Call], conditions: list[Condition], needed: int, context: Context
) -> Node | None:
    """The node of these calls anew. No conditions: hits cannot be counted."""
    catalyst, group = context.catalyst, calls[0].group
    if group is None:
        why = f"stops at {needed:,} rows that the filter keeps" if conditions else "windows grow: LIMIT above"
        context.notes.fired(NAME, calls[0].label, why)
        member = Answered(calls[0], bottom.resultAttrs().head(), calls[0].arguments)
        return group_node([member], _rewrite(bottom.child(), 0, context), context, conditions, needed)
    # A group without conditions may have calls that the filter is not about; one with a limit is done.
    if group.limit or not group.conditions:
        return None
    if sorted(map(str, conditions)) != sorted(map(str, group.conditions)):
        for call in calls:
            context.notes.declined(NAME, call.label, "the filter above has more than the conditions of the node")
        return None
    node = str(calls[0].udf.resultId().id())
    limited = msgspec.structs.replace(group, limit=needed, node=node)
    for call in calls:
        context.notes.fired(NAME, call.label, f"stops at {needed:,} rows that the filter keeps")
    calls = [dataclasses.replace(call, group=limited) for call in calls]
    return rebuilt(bottom, calls, catalyst, _rewrite(bottom.child(), 0, context))
