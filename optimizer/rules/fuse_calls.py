"""Calls over the same fields are asked side by side, by one node.

before                                         after
------                                         -----
ArrowEvalPython [llm(.., 'q', t)], [b]         Project [t, g.a0 AS a, g.a1 AS b]
+- ArrowEvalPython [llm(.., 'p', t)], [a]      +- ArrowEvalPython [llm_group({calls: p, q}, 'p', t, 'q')], [g]
   +- Relation [t]                                +- Relation [t]

Stacked, each call has a Python process of its own in every task, and the second begins when Spark hands it the rows of
the first: by then the first has gone on over thousands of others, and the fields of these rows may be out of the
engine's cache. In one node the calls of a window are sent together, so that the engine sees them as siblings below
one shared prefix. Prompts stay as they are; where the instruction stands was decided before (place_instruction.py).

Calls are fused that ask about the same fields, or ask one prompt with different options, under one model and system
text, for the same rows: no filter or limit stands between them, and their masks are equal. A call that needs another's
answer stays above that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from spark_llm.optimizer.catalyst.bridge import Expression, Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call
from spark_llm.optimizer.rules.conditions import below
from spark_llm.optimizer.rules.groups import MOST_CALLS, Answered, group_node, restacked, rewrite_stacks, single_call

NAME = "fuseCalls"


def fuse_calls(plan: Node, context: Context) -> Node:
    """Put calls of ``plan`` that stand one above the other and ask about the same into one node."""
    return rewrite_stacks(plan, context, ("Project", "BatchEvalPython"), _fused)


@dataclasses.dataclass(frozen=True)
class _Siblings:
    """Calls that can stand where the lowest of them does; ``members`` by number in the stack."""

    first: Call
    members: dict[int, Answered]


def _fused(nodes: list[Node], context: Context) -> Node | None:
    """The stack with its calls in groups; None if there is none to be made."""
    found: list[_Siblings] = []
    for number in reversed(range(len(nodes))):
        if (call := single_call(nodes[number], context)) is not None:
            _add(call, number, nodes, found, context)
    groups = [siblings for siblings in found if len(siblings.members) > 1]
    if not groups:
        return None
    replaced: dict[int, Callable[[Node], Node] | None] = {}
    columns: dict[int, Expression] = {}
    for siblings in groups:
        members = list(siblings.members.values())
        lowest = max(siblings.members)
        replaced |= dict.fromkeys(siblings.members)
        replaced[lowest] = functools.partial(group_node, members, context=context)
        columns |= {number: member.column for number, member in siblings.members.items()}
        for member in members:
            why = f"one of {len(members)} calls over the same fields in one node"
            context.notes.fired(NAME, member.call.label, why)
    return restacked(nodes, replaced, columns, context)


def _add(call: Call, number: int, nodes: list[Node], found: list[_Siblings], context: Context) -> None:
    """Put a call to those that it can be asked with, or begin with it."""
    column = nodes[number].resultAttrs().head()
    for siblings in found:
        if len(siblings.members) == MOST_CALLS or not _are_alike(siblings.first, call, context):
            continue
        bottom = nodes[max(siblings.members)].child()
        arguments = tuple(below(each, nodes[number].child(), bottom, context.catalyst) for each in call.arguments)
        if all(context.catalyst.has_input(argument, bottom) for argument in arguments):
            siblings.members[number] = Answered(call, column, arguments)
            return
    found.append(_Siblings(call, {number: Answered(call, column, call.arguments)}))


def _are_alike(one: Call, other: Call, context: Context) -> bool:
    """Do both ask one model about the same, and for the same rows?"""
    if (one.spec.model, one.spec.system) != (other.spec.model, other.spec.system):
        return False
    catalyst = context.catalyst
    masks = [None if call.mask is None else catalyst.traced(call.mask, call.node) for call in (one, other)]
    if masks[0] is None or masks[1] is None:
        if masks[0] is not masks[1]:
            return False
    elif not masks[0].semanticEquals(masks[1]):
        return False
    if not one.fields and not other.fields:
        prompts = [catalyst.traced(call.prompt, call.node) for call in (one, other)]
        return bool(prompts[0].semanticEquals(prompts[1]))
    return one.has_fields_of(other, catalyst)
