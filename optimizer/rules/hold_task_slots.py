"""A query's calls run in a part of the task slots only, so that another query's calls find free ones.

before                                           after
------                                           -----
ArrowEvalPython [llm(.., 'p', text)]             ArrowEvalPython [llm(.., 'p', text)]
+- Sort [text ASC], false                        +- Repartition 2, false
   +- RepartitionByExpression [text], 100           +- Sort [text ASC], false
                                                       +- RepartitionByExpression [text], 100

(On four slots.) Spark never takes a slot back from a task, so what is fair in the engine would not reach a query none
of whose tasks runs. Nothing limits the tasks of a stage but their number, and that is what this rule sets: the
partitions stay as they are, each sorted by itself, and a task takes several, one after the other. An engine loses
nothing by it: one task keeps several windows of rows in flight. What a lost task had asked is not asked again as long
as its engine remembers the answers, or spark.llm.cache.path keeps them.

Branches that may run at a time, sides of a join or a union, share what the query may take. It keeps out where the
order of rows can be seen or was asked for, and where the user chose the partitions (order_seen.py); under a LIMIT
Spark begins with one task anyway.
"""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import calls_of
from spark_llm.optimizer.rules.order_seen import has_order, has_partitions, sees_order
from spark_llm.optimizer.statistics.partitions import num_partitions

RULE = "holdTaskSlots"


def hold_task_slots(plan: Node, context: Context) -> Node:
    """Give the input of the calls of ``plan`` no more partitions than ``context.call_tasks``, without an exchange."""
    if not context.call_tasks or plan.isStreaming():
        return plan
    return _held(plan, context.call_tasks, False, context)


def _held(node: Node, tasks: int, is_seen: bool, context: Context) -> Node:
    """tasks: that the calls of ``node`` may take at a time. is_seen: the order of its rows is, above it."""
    catalyst = context.catalyst
    if not catalyst.holds_call(node):
        return node
    is_seen = sees_order(node, catalyst, is_seen)
    children = items(node.children())
    branches = sum(catalyst.holds_call(child) for child in children)
    each = max(1, tasks // max(1, branches))
    changed = [_held(child, each, is_seen, context) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        node = catalyst.with_children(node, changed)
    return _over_fewer(node, tasks, is_seen, context) if catalyst.is_call(node) else node


def _over_fewer(node: Node, tasks: int, is_seen: bool, context: Context) -> Node:
    """``node``, which evaluates calls, over at most so many partitions."""
    catalyst, child, calls = context.catalyst, node.child(), calls_of(node)
    partitions = num_partitions(child, context.session, catalyst)
    if partitions is not None and partitions <= tasks:
        return node
    placed = [call.spec.rows for call in calls if call.spec.rows is not None]  # by ReorderRows, and not as asked for
    why_not = None
    if is_seen:
        why_not = "the order of rows can be seen above"
    elif not any(plan.is_sorted for plan in placed) and has_order(child, catalyst):
        why_not = "the rows are sorted below"
    elif not any(plan.partitions for plan in placed) and has_partitions(child, catalyst):
        why_not = "the query asks for its partitions"
    if why_not is not None:
        for call in calls:
            context.notes.declined(RULE, call.label, f"may take all task slots: {why_not}")
        return node
    fewer = catalyst.plans.Repartition(tasks, False, child)
    for call in calls:
        context.notes.fired(RULE, call.label, f"at most {tasks} task{'s' * (tasks > 1)} at a time")
    return catalyst.with_children(node, [fewer])
