"""Where the order or the place of rows could be seen: what keeps ReorderRows out (CONTRACTS.md 10)."""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Catalyst, Node
from spark_llm.optimizer.rules.calls import calls_of
from spark_llm.optimizer.statistics.partitions import IN_PLACE

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
    "WindowGroupLimit",
    "WithCTE",
    "WriteFiles",
}
# Of these, the ones that take in all rows before they give the first: a LIMIT above them cuts nothing off below.
_BLOCKING = {
    "Aggregate",
    "Distinct",
    "Except",
    "Intersect",
    "RebalancePartitions",
    "RepartitionByExpression",
    "Sort",
    "Window",
}
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
_KEEPS_ORDER = _LIMITS | IN_PLACE
_STORED = {"InMemoryRelation", "LogicalRDD"}  # cached or checkpointed rows, with the order that they were stored in


def sees_order(node: Node, catalyst: Catalyst, above: bool) -> bool:
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
    if name in _BLOCKING or (name == "Repartition" and node.shuffle()):
        above = False
    if name == "Window" and node.orderSpec().isEmpty():
        return True
    if name == "Aggregate" and not catalyst.aggregate_functions(node) <= _ORDERLESS:
        return True
    return above or not catalyst.is_deterministic(node)


def has_order(node: Node, catalyst: Catalyst) -> bool:
    """Do the rows of ``node`` come in an order that the user asked for (and that ReorderRows did not make)?"""
    while (name := node.nodeName()) in _KEEPS_ORDER:
        if catalyst.is_call(node) and rows_are_placed(node):
            return False
        node = node.child()
    if name == "Repartition" and not node.shuffle():  # coalesce() joins whole partitions
        return has_order(node.child(), catalyst)
    return name == "Sort" or (name in _STORED and not node.outputOrdering().isEmpty())


def has_partitions(node: Node, catalyst: Catalyst) -> bool:
    """Are the rows of ``node`` in partitions that the user asked for (``repartition()``, ``DISTRIBUTE BY``)?"""
    while (name := node.nodeName()) in _KEEPS_ORDER or name == "Sort":
        if catalyst.is_call(node) and rows_are_placed(node):
            return False
        node = node.child()
    return name in ("Repartition", "RepartitionByExpression")


def rows_are_placed(call: Node) -> bool:
    """Did ReorderRows put an exchange or a sort below this call?"""
    return any(found.spec.rows is not None and found.spec.rows.is_sorted for found in calls_of(call))
