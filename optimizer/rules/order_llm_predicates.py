"""Filters over several calls become one node, which asks first what drops rows for the fewest tokens.

before                                            after
------                                            -----
Filter (b = 'y')                                  Filter ((a = 'x') AND (b = 'y'))
+- ArrowEvalPython [llm(.., 'q', t)], [b]         +- Project [t, g.a0 AS a, g.a1 AS b]
   +- Filter (a = 'x')                               +- ArrowEvalPython [llm_group({calls: p, q; conditions: ..}, ..)]
      +- ArrowEvalPython [llm(.., 'p', t)], [a]         +- Relation [t]
         +- Relation [t]

Spark asks conjuncts in the order in which they are written. The node gets them as conditions, learns from answers that
it needed anyway how many rows each call drops and what it costs, and asks the second call only about the rows that the
first one left (spark_llm/predicate_order.py). A call below the filter that has no conjunct is asked about the rows that
are left in the end. Conjuncts without a call stand below all calls.

A call stays a node of its own where it needs another's answer, is drawn without a seed, or where one of its conjuncts
is none that a task can evaluate as Spark does; it stands above the group, and so is asked about the rows that the group
left, unless it is written first. So do embeddings (embeddings_first.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from spark_llm.optimizer.catalyst.bridge import Expression, Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call
from spark_llm.optimizer.rules.conditions import Conjunct, below, conjuncts, renumbered
from spark_llm.optimizer.rules.groups import (
    MOST_CALLS,
    Answered,
    group_node,
    restacked,
    rewrite_stacks,
    single_call,
)

NAME = "orderLlmPredicates"


def order_llm_predicates(plan: Node, context: Context) -> Node:
    """Put calls of ``plan`` under one filter, or under filters one above the other, into a group with conditions."""
    return rewrite_stacks(plan, context, ("Filter", "Project", "BatchEvalPython"), _grouped)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """nodes: from the topmost Filter down to the lowest call of the group to be. answers: the number in ``nodes`` of
    the call of each answer in conditions. members: the group's calls by number in ``nodes``, the one that is written
    first first. filters: the conjuncts of the Filters, by number in ``nodes``; of nodes are their answers, too."""

    nodes: list[Node]
    answers: list[int]
    members: dict[int, Answered]
    filters: dict[int, list[Conjunct]]

    def conditions(self) -> list[Conjunct]:
        """The conjuncts that the group takes over, as they are written."""
        found = [conjunct for number in sorted(self.filters, reverse=True) for conjunct in self.filters[number]]
        return [conjunct for conjunct in found if self.takes(conjunct)]

    def takes(self, conjunct: Conjunct) -> bool:
        """Is the conjunct one on the group's answers alone, that a task can evaluate?"""
        return conjunct.condition is not None and bool(conjunct.answers) and conjunct.answers <= self.members.keys()


def _grouped(nodes: list[Node], context: Context) -> Node | None:
    """The stack with a group of calls in it; None if there is none to be made."""
    top = next((number for number, node in enumerate(nodes) if node.nodeName() == "Filter"), len(nodes))
    below_top = nodes[top:]
    calls = {number: call for number, node in enumerate(below_top) if (call := single_call(node, context)) is not None}
    for base in sorted(calls, reverse=True):
        stack = _stack(
            below_top[: base + 1], {number: call for number, call in calls.items() if number <= base}, context
        )
        if base in stack.members and len(stack.members) > 1 and stack.conditions():
            return restacked([*nodes[:top], _rebuilt(stack, context)], {}, {}, context)
    return None


def _stack(nodes: list[Node], calls: dict[int, Call], context: Context) -> _Stack:
    """The stack with the calls that can be put together upon what its last node stands on."""
    catalyst = context.catalyst
    bottom = nodes[-1].child()
    numbers = sorted(calls, reverse=True)
    columns = {number: nodes[number].resultAttrs().head() for number in numbers}
    filters = {
        number: [
            dataclasses.replace(found, answers=frozenset(numbers[answer] for answer in found.answers))
            for found in conjuncts(node, bottom, list(columns.values()), catalyst)
        ]
        for number, node in enumerate(nodes)
        if node.nodeName() == "Filter"
    }
    members: dict[int, Answered] = {}
    for number in numbers:
        call, child = calls[number], nodes[number].child()
        arguments = tuple(below(argument, child, bottom, catalyst) for argument in call.arguments)
        if len(members) < MOST_CALLS and all(catalyst.has_input(argument, bottom) for argument in arguments):
            members[number] = Answered(call, columns[number], arguments)
    stack = _Stack(nodes, numbers, members, filters)
    while left := _left_alone(stack):
        for number in left:
            call = members.pop(number).call
            if len(calls) > 1:
                why = "a filter on its answer is none that a task can evaluate as Spark does"
                context.notes.declined(NAME, call.label, why)
    return stack


def _left_alone(stack: _Stack) -> set[int]:
    """Members with a conjunct that the group cannot take: what it drops, the group's other calls would be asked."""
    found = [conjunct for of_filter in stack.filters.values() for conjunct in of_filter if not stack.takes(conjunct)]
    return {number for conjunct in found for number in conjunct.answers if number in stack.members}


def _rebuilt(stack: _Stack, context: Context) -> Node:
    taken = stack.conditions()
    numbers = [stack.answers.index(number) for number in stack.members]
    conditions = [renumbered(conjunct.condition, numbers) for conjunct in taken if conjunct.condition is not None]
    cheap = [conjunct for of_filter in stack.filters.values() for conjunct in of_filter if conjunct.is_cheap]

    def group(child: Node) -> Node:
        if cheap:
            child = _filter([conjunct.below for conjunct in cheap], child, context)
        node = group_node(list(stack.members.values()), child, context, conditions)
        return _filter([conjunct.below for conjunct in taken], node, context)

    replaced: dict[int, Callable[[Node], Node] | None] = dict.fromkeys(stack.members)
    replaced[len(stack.nodes) - 1] = group
    for number, of_filter in stack.filters.items():
        rest = [each.expression for each in of_filter if not each.is_cheap and not stack.takes(each)]
        replaced[number] = functools.partial(_filter, rest, context=context) if rest else None
    for member in stack.members.values():
        others = len(stack.members) - 1
        why = f"one node with {others} other {'call' if others == 1 else 'calls'}, asked by cost per dropped row"
        context.notes.fired(NAME, member.call.label, why)
    columns = {number: member.column for number, member in stack.members.items()}
    return restacked(stack.nodes, replaced, columns, context)


def _filter(conditions: list[Expression], child: Node, context: Context) -> Node:
    condition = conditions[0]
    for other in conditions[1:]:
        condition = context.catalyst.expressions.And(condition, other)
    return context.catalyst.plans.Filter(condition, child)
