"""The input of a call as a plan that may be run for statistics: without other calls, over what is cheap to read."""

from __future__ import annotations

from typing import NamedTuple

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items

_PYTHON = {"ArrowEvalPython", "BatchEvalPython"}
# What a job of seconds may run again: files, cached tables and local rows, joined, filtered and grouped by Spark.
_CHEAP = {
    "Aggregate",
    "CTERelationDef",
    "CTERelationRef",
    "Distinct",
    "Except",
    "Expand",
    "Filter",
    "Generate",
    "GlobalLimit",
    "Intersect",
    "Join",
    "LocalLimit",
    "Project",
    "RebalancePartitions",
    "Repartition",
    "RepartitionByExpression",
    "ResolvedHint",
    "Sample",
    "Sort",
    "Subquery",
    "SubqueryAlias",
    "Union",
    "Window",
    "WindowGroupLimit",
    "WithCTE",
}
_LEAVES = {"HiveTableRelation", "InMemoryRelation", "LocalRelation", "LogicalRDD", "OneRowRelation", "Range"}


class Plain(NamedTuple):
    """``plan`` gives the call's rows; ``refusal`` says why no job may run it, None: it may."""

    plan: Node | None
    refusal: str | None


def plain_input(node: Node, needed: list[Expression], max_bytes: int, catalyst: Catalyst) -> Plain:
    """The input of a call, ``node``, without the Python calls below it, where the call's arguments need none of them.

    A filter on such a call's answer is left out: the statistics are then of the rows before it.
    """
    plan = _without_calls(node, catalyst)
    if plan is None or any(not catalyst.has_input(argument, plan) for argument in needed):
        return Plain(None, "a field comes from a Python function or another call")
    refusal = None
    if catalyst.has_udf(plan):
        refusal = "there is a UDF below the call"
    elif dear := _dear_node(plan, catalyst):
        refusal = f"{dear} below the call may be dear to run twice"
    elif (size := size_of(plan)) > max_bytes:
        refusal = f"the tables below the call have {size / 2**20:,.0f} MiB"
    return Plain(plan, refusal)


def leaves(plan: Node) -> list[Node]:
    """The plan's tables, left to right."""
    children = items(plan.children())
    return [leaf for child in children for leaf in leaves(child)] if children else [plan]


def size_of(plan: Node) -> int:
    """Bytes of the tables below; those that do not know their size are in memory and count nothing."""
    sizes = [int(str(leaf.stats().sizeInBytes())) for leaf in leaves(plan) if leaf.nodeName() != "LogicalRDD"]
    return sum(sizes)


def _without_calls(node: Node, catalyst: Catalyst) -> Node | None:
    """``node`` without the Python calls that it evaluates; None if something needs them."""
    if not catalyst.holds_python(node):
        return node
    name = node.nodeName()
    children = [_without_calls(child, catalyst) for child in items(node.children())]
    if any(child is None for child in children):
        return None
    if name in _PYTHON:
        return children[0]
    if name == "Filter" and not catalyst.has_input(node.condition(), children[0]):
        return children[0]
    if name == "Project":
        kept = [entry for entry in items(node.projectList()) if catalyst.has_input(entry, children[0])]
        return catalyst.plans.Project(catalyst.seq(kept), children[0])
    if name == "Sort":
        return children[0]
    plans = [child for child in children if child is not None]
    if name == "Union" and len({int(child.output().size()) for child in plans}) > 1:
        return None
    changed = catalyst.with_children(node, plans)
    return changed if changed.missingInput().isEmpty() else None


def _dear_node(plan: Node, catalyst: Catalyst) -> str | None:
    """What in the plan may be dear to run for statistics alone, or None."""
    name = str(plan.nodeName())
    children = items(plan.children())
    if not children:
        if name.startswith("LogicalRelation") or name == "Relation":
            return None if catalyst.is_file_relation(plan) else "a table that is no file"
        if name == "LogicalRDD" and not catalyst.is_local_rdd(plan):
            return "an RDD with Python code"
        if name == "InMemoryRelation" and not catalyst.is_filled_cache(plan):
            return "a cached table that is not filled yet"
        return None if name in _LEAVES else name
    if name == "Join" and not catalyst.has_equality(plan) and min(size_of(child) for child in children) > 1 << 16:
        return "a join without an equality"
    if name not in _CHEAP:
        return name
    return next((dear for child in children if (dear := _dear_node(child, catalyst))), None)
