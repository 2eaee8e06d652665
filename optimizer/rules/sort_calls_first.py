"""Calls that a limited sort needs stand below calls that it does not need.

before                                            after
------                                            -----
GlobalLimit 3                                     GlobalLimit 3
+- LocalLimit 3                                   +- LocalLimit 3
   +- Sort [cosine(v, ..) DESC], true                +- Sort [cosine(v, ..) DESC], true
      +- ArrowEvalPython [embed(t)], [v]                +- Project [t, a, v]
         +- ArrowEvalPython [llm(.., 'p', t)], [a]         +- ArrowEvalPython [llm(.., 'p', t)], [a]
            +- Relation [t]                                   +- ArrowEvalPython [embed(t)], [v]
                                                                 +- Relation [t]

Spark evaluates the key of an ORDER BY that is no column of the result above all that the SELECT asks. A limit passes
only calls that stand above what it depends on; so placed, limit_before_calls takes it below the other call, which is
asked for three rows. Where the key is made of an answer to an answer, both calls go down.
"""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.placing import references
from spark_llm.optimizer.rules.calls import Call, rebuilt
from spark_llm.optimizer.rules.conditions import below
from spark_llm.optimizer.rules.groups import repeatable_call, restacked, rewrite_stacks, upon

_LIMITS = ("GlobalLimit", "LocalLimit")


def sort_calls_first(plan: Node, context: Context) -> Node:
    """Put the calls of ``plan`` that a sort below a limit needs below those that it does not."""
    return rewrite_stacks(plan, context, (*_LIMITS, "Sort", "Project", "BatchEvalPython"), _moved)


def _moved(nodes: list[Node], context: Context) -> Node | None:
    """The stack with what its topmost limited sort needs at the bottom of the calls below that; None: it is so."""
    catalyst = context.catalyst
    names = [node.nodeName() for node in nodes]
    limit = next((number for number, name in enumerate(names) if name in _LIMITS), len(nodes))
    top = next((number for number in range(limit, len(nodes)) if names[number] == "Sort"), None)
    if top is None:
        return None
    end = next((number for number in range(top + 1, len(nodes)) if names[number] in (*_LIMITS, "Sort")), len(nodes))
    stack = nodes[top + 1 : end]
    calls = [number for number, node in enumerate(stack) if catalyst.is_call(node)]
    if len(calls) < 2:
        return None
    needed = _needed(nodes[top], stack, context)
    last = next((number for number in reversed(calls) if number not in needed), -1)
    stack = stack[: last + 1]
    needed = {number for number in needed if number < last}
    if not needed:
        return None
    bottom = stack[-1].child()
    made, calls_below = bottom, dict[int, Call]()
    for number in sorted(needed, reverse=True):
        call = repeatable_call(stack[number], context)
        moved = None if call is None else upon(bottom, call, stack[number], made, context)
        if moved is None:
            return None
        made = rebuilt(stack[number], [moved], catalyst, made)
        calls_below[number] = moved
    carried = {number: stack[number].resultAttrs().head() for number in needed}
    replaced = {**dict.fromkeys(needed), last: lambda _: catalyst.with_children(stack[last], [made])}
    node = restacked(stack, replaced, carried, context)
    for above in reversed(nodes[: top + 1]):
        node = catalyst.with_children(above, [node])
    return node


def _needed(sort: Node, stack: list[Node], context: Context) -> set[int]:
    """The numbers in ``stack`` of the nodes that evaluate what the sort's keys are made of."""
    catalyst = context.catalyst
    bottom = stack[-1].child()
    wanted = references([below(order, sort.child(), bottom, catalyst) for order in items(sort.order())], catalyst)
    found = set()
    for number, node in enumerate(stack):
        if node.nodeName() == "Project":
            continue
        if wanted & {int(answer.exprId().id()) for answer in items(node.resultAttrs())}:
            found.add(number)
            arguments = [below(udf, node.child(), bottom, catalyst) for udf in items(node.udfs())]
            wanted |= references(arguments, catalyst)
    return found
