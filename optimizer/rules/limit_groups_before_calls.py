"""A call is asked about the rows that a "first n of each group" leaves.

before                                                 after
------                                                 -----
Project [id, answer]                                   Project [id, answer]
+- Filter (rn = 1)                                     +- Project [id, k, pythonUDF0 AS answer, rn]
   +- Window [row_number() ... AS rn], [k], [id]          +- ArrowEvalPython [llm(.., 'p', text)]
      +- WindowGroupLimit [k], [id], row_number(), 1         +- Filter (rn = 1)
         +- Project [id, k, pythonUDF0 AS answer]               +- Window [row_number() ... AS rn], [k], [id]
            +- ArrowEvalPython [llm(.., 'p', text)]                +- WindowGroupLimit [k], [id], row_number(), 1
               +- Relation [id, k, text]                              +- Project [id, k, text]
                                                                         +- Relation [id, k, text]

Spark itself finds that a filter on row_number(), rank() or dense_rank() limits each group (WindowGroupLimit). The
groups, their order and the filter must not need the answer.
"""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Expression, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import calls_of

_RULE = "limitBeforeCalls"


def limit_groups_before_calls(plan: Node, context: Context) -> Node:
    """Move each group limit of ``plan`` below the calls that it does not need."""
    return plan if plan.isStreaming() else _rewrite(plan, context)


def _rewrite(node: Node, context: Context) -> Node:
    catalyst = context.catalyst
    if not catalyst.holds_call(node):
        return node
    while node.nodeName() == "Filter" and (moved := _moved(node, context)) is not None:
        node = moved
    children = items(node.children())
    changed = [_rewrite(child, context) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        node = catalyst.with_children(node, changed)
    return node


def _moved(node: Node, context: Context) -> Node | None:
    """The filter on a rank above the call, with the call above the filter; None where that cannot be."""
    catalyst = context.catalyst
    window = node.child()
    limit = window.child() if window.nodeName() == "Window" else None
    if limit is None or limit.nodeName() != "WindowGroupLimit":
        return None
    project = limit.child() if limit.child().nodeName() == "Project" else None
    call = limit.child() if project is None else project.child()
    if not catalyst.is_call(call) or not all(found.spec.is_repeatable for found in calls_of(call)):
        return None
    if not all(catalyst.is_deterministic(each) for each in (node, window, limit, *filter(None, [project]))):
        return None
    answers = _ids(call.resultAttrs())
    entries = items(call.output()) if project is None else items(project.projectList())
    made = {int(entry.exprId().id()): entry for entry in entries if _ids(entry.references()) & answers}
    if any(_ids(each.references()) & made.keys() for each in (node, window, limit)):
        for found in calls_of(call):
            context.notes.declined(_RULE, found.label, "the groups, their order or the filter need the answer")
        return None
    kept = [entry for entry in entries if int(entry.exprId().id()) not in made]
    there = {int(entry.exprId().id()) for entry in kept}
    udfs = items(call.udfs())
    needed: dict[int, Expression] = {}
    for each in (*udfs, *made.values()):
        for attribute in items(each.references().toSeq()):
            number = int(attribute.exprId().id())
            if number not in answers and number not in there:
                needed[number] = attribute
    below = catalyst.plans.Project(catalyst.seq([*kept, *needed.values()]), call.child())
    for each in (limit, window, node):
        below = catalyst.with_children(each, [below])
    above = catalyst.plans.ArrowEvalPython(call.udfs(), call.resultAttrs(), below, call.evalType())
    for found in calls_of(call):
        context.notes.fired(_RULE, found.label, "asked about the first rows of each group only")
    columns = [made.get(int(column.exprId().id()), column) for column in items(node.output())]
    return catalyst.plans.Project(catalyst.seq(columns), above)


def _ids(attributes: object) -> set[int]:
    """The ids of a Seq or an AttributeSet of attributes."""
    return {int(attribute.exprId().id()) for attribute in items(attributes.toSeq())}  # type: ignore[attr-defined]
