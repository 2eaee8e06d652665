"""Rows that share a prompt prefix become neighbours within their task.

before                                      after
------                                      -----
Project [id, pythonUDF0 AS answer]          Project [id, pythonUDF0 AS answer]
+- ArrowEvalPython [llm(.., 'p', info, n)]  +- Project [id, info, n, pythonUDF0]
   +- Relation [id, info, n]                   +- ArrowEvalPython [llm(.., 'p', info, _llm2)]
                                                  +- Sort [info ASC, _llm2 ASC], false
                                                     +- Project [id, info, n, cast(n as string) AS _llm2]
                                                        +- Relation [id, info, n]

The sort is local: no exchange, no other partitions, and no row more or less. Arguments that are computed (a number's
JSON) are computed once, below the sort; where all are columns the two extra Projects are not there.

It keeps out where the order of rows can be seen: see ``_sees_order`` for what stands above the call and
``_has_order`` for what stands below.
"""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items

# Above the call: nodes whose result is the same bag of rows in whatever order their input comes.
_BAG_TO_BAG = {
    "Aggregate",
    "ArrowEvalPython",
    "BatchEvalPython",
    "CTERelationDef",
    "Distinct",
    "Except",
    "Expand",
    "Filter",
    "Generate",
    "Intersect",
    "Join",
    "Project",
    "RebalancePartitions",
    "Repartition",
    "RepartitionByExpression",
    "ResolvedHint",
    "Sort",
    "Subquery",
    "SubqueryAlias",
    "Union",
    "Window",
    "WithCTE",
    "WriteFiles",
}
# Of these, the ones that take in all rows before they give the first: a LIMIT above them cuts nothing off below.
_BLOCKING = {"Aggregate", "Distinct", "Except", "Intersect", "Sort", "Window"}
_LIMITS = {"GlobalLimit", "LocalLimit", "Offset", "Tail"}
# Aggregate functions to which the order of rows is nothing (sums of floating-point numbers: but for their rounding,
# which depends on Spark's partitions anyway). first() and collect_list() show the order, though Spark calls them
# deterministic.
_ORDERLESS = {
    "Average",
    "BitAndAgg",
    "BitOrAgg",
    "BitXorAgg",
    "Corr",
    "Count",
    "CovPopulation",
    "CovSample",
    "HyperLogLogPlusPlus",
    "Kurtosis",
    "Max",
    "Min",
    "Percentile",
    "Skewness",
    "StddevPop",
    "StddevSamp",
    "Sum",
    "VariancePop",
    "VarianceSamp",
}
# Below the call: nodes that hand their input's order on.
_KEEPS_ORDER = _LIMITS | {
    "ArrowEvalPython",
    "BatchEvalPython",
    "Expand",
    "Filter",
    "Generate",
    "Project",
    "ResolvedHint",
    "Sample",
    "SubqueryAlias",
}
_STORED = {"InMemoryRelation", "LogicalRDD"}  # cached or checkpointed rows, with the order that they were stored in


def order_rows(plan: Node, catalyst: Catalyst) -> Node:
    """Put a local sort on prompt and fields, in the order of the arguments, below each llm() call of ``plan``."""
    if plan.isStreaming():
        return plan
    return _rewrite(plan, catalyst, order_seen=False)


def _rewrite(node: Node, catalyst: Catalyst, order_seen: bool) -> Node:
    if not catalyst.holds_call(node):
        return node
    order_seen = _sees_order(node, catalyst, order_seen)
    children = items(node.children())
    changed = [_rewrite(child, catalyst, order_seen) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        node = catalyst.with_children(node, changed)
    return node if order_seen or not catalyst.is_call(node) else _sorted(node, catalyst)


def _sees_order(node: Node, catalyst: Catalyst, above: bool) -> bool:
    """Could ``node``, or what stands above it, show in which order its children's rows come?

    A LIMIT does, unless something blocking stands between; non-deterministic functions do (rand(), the position of a
    row), aggregates such as first() and collect_list() do, a window without ORDER BY does, and a node that is not known
    here may.
    """
    name = node.nodeName()
    if name in _LIMITS:
        return True
    if name not in _BAG_TO_BAG and not catalyst.is_a(node, "org.apache.spark.sql.catalyst.plans.logical.Command"):
        return True
    if name in _BLOCKING:
        above = False
    if name == "Window" and node.orderSpec().isEmpty():
        return True
    if name == "Aggregate" and not catalyst.aggregate_functions(node) <= _ORDERLESS:
        return True
    return above or not catalyst.is_deterministic(node)


def _has_order(node: Node, catalyst: Catalyst) -> bool:
    """Do the rows of ``node`` come in an order that the user asked for (and that this rule did not make)?"""
    while (name := node.nodeName()) in _KEEPS_ORDER:
        call, node = node, node.child()
        if catalyst.is_call(call) and _is_own_sort(node, call):
            node = node.child()
    if name == "Repartition" and not node.shuffle():  # coalesce() joins whole partitions
        return _has_order(node.child(), catalyst)
    return name == "Sort" or (name in _STORED and not node.outputOrdering().isEmpty())


def _sorted(call: Node, catalyst: Catalyst) -> Node:
    """``call`` over a local sort on its arguments, or as it is where its rows are in that order or in the user's."""
    keys = _keys(call)
    child = call.child()
    if not keys or not all(key.deterministic() for key in keys):
        return call
    if _is_own_sort(child, call) or _is_sorted_alike(child, keys, catalyst) or _has_order(child, catalyst):
        return call
    output = call.output()
    computed = [(key, catalyst.named(key, f"_llm{i}")) for i, key in enumerate(keys) if not catalyst.is_attribute(key)]
    if computed:
        child = catalyst.plans.Project(child.output().concat(catalyst.seq(alias for _, alias in computed)), child)

    def column(argument: Expression) -> Expression:
        return next((a.toAttribute() for key, a in computed if key.semanticEquals(argument)), argument)

    order = catalyst.seq(catalyst.ascending(column(key)) for key in keys)
    child = catalyst.plans.Sort(order, False, child, catalyst.none)
    udfs = catalyst.seq(
        catalyst.with_children(udf, [column(argument) for argument in items(udf.children())])
        for udf in items(call.udfs())
    )
    call = catalyst.plans.ArrowEvalPython(udfs, call.resultAttrs(), child, call.evalType())
    return catalyst.plans.Project(output, call) if computed else call


def _keys(call: Node) -> list[Expression]:
    """What a call's prompts depend on, row by row, in the order of the arguments: each once, constants left out."""
    keys: list[Expression] = []
    for udf in items(call.udfs()):
        for argument in items(udf.children()):
            if not argument.foldable() and not any(key.semanticEquals(argument) for key in keys):
                keys.append(argument)
    return keys


def _is_own_sort(node: Node, call: Node) -> bool:
    """Is ``node`` the sort that this rule puts below ``call``?"""
    return node.nodeName() == "Sort" and not getattr(node, "global")() and _equal(_sort_columns(node), _keys(call))


def _is_sorted_alike(node: Node, keys: list[Expression], catalyst: Catalyst) -> bool:
    """Does a call below ask for the same order (two questions over the same fields)?

    That call's arguments may already be columns of the Project that this rule made; then what they stand for counts.
    """
    while not catalyst.is_call(node):
        if node.nodeName() not in ("Project", "Filter", "BatchEvalPython"):
            return False
        node = node.child()
    below = _keys(node)
    if _is_own_sort(node.child(), node) and (columns := node.child().child()).nodeName() == "Project":
        made = [entry for entry in items(columns.projectList()) if entry.nodeName() == "Alias"]
        below = [
            next((alias.child() for alias in made if alias.toAttribute().semanticEquals(key)), key) for key in below
        ]
    return _equal(below, keys)


def _sort_columns(sort: Node) -> list[Expression]:
    return [order.child() for order in items(sort.order())]


def _equal(left: list[Expression], right: list[Expression]) -> bool:
    return len(left) == len(right) and all(a.semanticEquals(b) for a, b in zip(left, right, strict=True))
