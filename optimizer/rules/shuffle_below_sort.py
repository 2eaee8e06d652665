"""A call below ORDER BY runs once per row, not twice.

before                                              after
------                                              -----
Sort [id ASC], true                                 Sort [id ASC], true
+- Project [id, pythonUDF0 AS answer]               +- RepartitionByExpression [id]
   +- ArrowEvalPython [llm(.., 'p', text)]             +- Project [id, pythonUDF0 AS answer]
      +- Relation [id, text]                              +- ArrowEvalPython [llm(.., 'p', text)]
                                                             +- Relation [id, text]

Spark sorts a whole table by ranges that it learns from a first run of what stands below: 80 calls for 40 rows. With an
exchange between, the first run reads the exchange's files. The same for ``repartitionByRange()``. It keeps out where
something between sort and call shuffles anyway, and of ORDER BY ... LIMIT, which needs no ranges. What is computed of
answers to sort by it is computed below the exchange, which then need not carry them: a vector is kilobytes, what ORDER
BY ai_similarity(...) compares a number.
"""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items
from spark_llm.optimizer.catalyst.context import Context

# Nodes whose input comes over an exchange of its own.
_SHUFFLES = {
    "Aggregate",
    "Distinct",
    "Except",
    "GlobalLimit",
    "Intersect",
    "RebalancePartitions",
    "RepartitionByExpression",
    "Window",
}
_LIMITS = {"GlobalLimit", "LocalLimit"}


def shuffle_below_sort(plan: Node, context: Context) -> Node:
    """Put an exchange between each global sort of ``plan`` and the calls right below it."""
    if plan.isStreaming():
        return plan
    changed = _rewrite(plan, context.catalyst, is_limited=False)
    if changed is not plan:
        context.notes.fired("shuffleBelowSort", "", "an exchange below the global sort, which runs what is below twice")
    return changed


def _rewrite(node: Node, catalyst: Catalyst, is_limited: bool, above: Node | None = None) -> Node:
    """above: the Project right above ``node``, if there is one."""
    if not catalyst.holds_call(node):
        return node
    name = node.nodeName()
    # A Project between is no hindrance: Spark takes the first n rows below it, too.
    below = name in _LIMITS or (is_limited and name == "Project")
    children = items(node.children())
    changed = [_rewrite(child, catalyst, below, node if name == "Project" else None) for child in children]
    if not is_limited and (keys := _range_keys(node)) and _runs_calls(changed[0], catalyst):
        if name == "Sort" and above is not None and not all(map(catalyst.is_attribute, keys)):
            return _by_computed(node, keys, changed[0], above, catalyst)
        return catalyst.with_children(node, [catalyst.repartition(keys, changed[0])])
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        node = catalyst.with_children(node, changed)
    return node


def _by_computed(sort: Node, keys: list[Expression], child: Node, above: Node, catalyst: Catalyst) -> Node:
    """``sort`` over an exchange of its computed keys and of the columns that ``above`` needs, no others."""
    aliases = {i: catalyst.named(key, f"_llm_key{i}") for i, key in enumerate(keys) if not catalyst.is_attribute(key)}
    columns = [aliases[i].toAttribute() if i in aliases else key for i, key in enumerate(keys)]
    needed = above.references()
    plain = {int(key.exprId().id()) for i, key in enumerate(keys) if i not in aliases}
    kept = [each for each in items(child.output()) if needed.contains(each) or int(each.exprId().id()) in plain]
    computed = catalyst.plans.Project(catalyst.seq([*kept, *aliases.values()]), child)
    orders = [
        catalyst.with_children(order, [column, *items(order.sameOrderExpressions())])
        for order, column in zip(items(sort.order()), columns, strict=True)
    ]
    exchanged = catalyst.repartition(columns, computed)
    return catalyst.plans.Sort(catalyst.seq(orders), True, exchanged, catalyst.none)


def _range_keys(node: Node) -> list[Expression]:
    """What Spark makes ranges of for ``node``, a global sort or a ``repartitionByRange()``; of others nothing."""
    if node.nodeName() == "Sort" and getattr(node, "global")():
        return [order.child() for order in items(node.order())]
    if node.nodeName() == "RepartitionByExpression":
        return [key.child() for key in items(node.partitionExpressions()) if key.nodeName() == "SortOrder"]
    return []


def _runs_calls(node: Node, catalyst: Catalyst) -> bool:
    """Does running ``node`` run a call, with no exchange between?"""
    if not catalyst.holds_call(node):
        return False
    name = node.nodeName()
    if (
        name in _SHUFFLES
        or (name == "Repartition" and node.shuffle())
        or (name == "Sort" and getattr(node, "global")())
    ):
        return False
    return catalyst.is_call(node) or any(_runs_calls(child, catalyst) for child in items(node.children()))
