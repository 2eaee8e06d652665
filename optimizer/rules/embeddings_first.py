"""A condition on embeddings drops rows before other calls are asked about them.

before                                               after
------                                               -----
Filter ((a = 'x') AND (cosine(v, ..) > 0.6))         Project [t, a, v]
+- ArrowEvalPython [embed(t)], [v]                   +- Filter (a = 'x')
   +- ArrowEvalPython [llm(.., 'p', t)], [a]            +- ArrowEvalPython [llm(.., 'p', t)], [a]
      +- Relation [t]                                      +- Filter (cosine(v, ..) > 0.6)
                                                              +- ArrowEvalPython [embed(t)], [v]
                                                                 +- Relation [t]

A vector costs a small part of what an answer costs, so it is asked first, however the conditions are written. The task
could not evaluate such a condition; Spark does, between the two nodes. Where a mask would spare an embedding the rows
that another call's answer drops, it is asked about these, too. A condition that needs another call's answer, or an
embedding of another call's answer, stays where it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import msgspec

from spark_llm.optimizer.catalyst.bridge import Expression, Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, rebuilt
from spark_llm.optimizer.rules.conditions import Conjunct, below, conjuncts
from spark_llm.optimizer.rules.groups import repeatable_call, restacked, rewrite_stacks, upon

NAME = "orderLlmPredicates"


def embeddings_first(plan: Node, context: Context) -> Node:
    """Put the embeddings of ``plan`` that a filter needs, with its conditions on them, below the calls under it."""
    return rewrite_stacks(plan, context, ("Filter", "Project", "BatchEvalPython"), _moved)


def _moved(nodes: list[Node], context: Context) -> Node | None:
    """The stack with embeddings and their conditions at its bottom; None where nothing is gained by that."""
    catalyst = context.catalyst
    places = [number for number, node in enumerate(nodes) if catalyst.is_call(node)]
    embeds = {number: call for number in places if (call := _embedding(nodes[number], context)) is not None}
    prompts = [number for number in places if number not in embeds]
    top = next((number for number, node in enumerate(nodes) if node.nodeName() == "Filter"), len(nodes))
    if not embeds or not prompts or prompts[-1] < top:
        return None
    last = places[-1]
    stack, bottom = nodes[: last + 1], nodes[last].child()
    there = {number: moved for number, call in embeds.items() if (moved := _upon(bottom, call, nodes[number], context))}
    made = _over(bottom, nodes, there, context)
    taken: dict[int, list[Conjunct]] = {}
    rest: dict[int, list[Conjunct]] = {}
    numbers = list(embeds)
    columns = [nodes[number].resultAttrs().head() for number in numbers]
    for number, node in enumerate(stack):
        if node.nodeName() != "Filter":
            continue
        for found in conjuncts(node, bottom, columns, catalyst):
            asked = {numbers[answer] for answer in found.answers}
            stands = asked and asked <= there.keys() and catalyst.has_input(found.below, made)
            is_taken = stands and number < prompts[-1] and found.below.deterministic()
            (taken if is_taken else rest).setdefault(number, []).append(found)
    used = sorted({numbers[answer] for each in taken.values() for found in each for answer in found.answers})
    if not used:
        return None

    def first(child: Node) -> Node:
        child = _over(child, nodes, {number: there[number] for number in used}, context)
        child = _filter([found.below for each in taken.values() for found in each], child, context)
        return child if last in used else catalyst.with_children(nodes[last], [child])

    replaced: dict[int, Callable[[Node], Node] | None] = {
        number: functools.partial(_filter, [found.expression for found in rest[number]], context=context)
        if number in rest
        else None
        for number in taken
    }
    replaced |= dict.fromkeys(used)
    replaced[last] = first
    for number in used:
        context.notes.fired(NAME, embeds[number].label, "a filter on it drops rows before other calls are asked")
    carried = {number: nodes[number].resultAttrs().head() for number in used}
    return restacked(stack, replaced, carried, context)


def _embedding(node: Node, context: Context) -> Call | None:
    call = repeatable_call(node, context)
    return call if call is not None and call.spec.task == "embed" else None


def _over(node: Node, nodes: list[Node], calls: dict[int, Call], context: Context) -> Node:
    """``node`` with the columns of calls, by number in ``nodes``."""
    for number in sorted(calls, reverse=True):
        node = rebuilt(nodes[number], [calls[number]], context.catalyst, node)
    return node


def _upon(bottom: Node, call: Call, node: Node, context: Context) -> Call | None:
    """The embedding in terms of ``bottom``, asked also where its mask only waits for another call's answer."""
    catalyst = context.catalyst
    if call.mask is not None:
        mask = below(call.mask, node.child(), bottom, catalyst)
        known = [each for each in _operands(mask) if catalyst.has_input(each, bottom)]
        spec = msgspec.structs.replace(call.spec, masked=bool(known))
        made = functools.reduce(catalyst.expressions.And, known) if known else None
        call = dataclasses.replace(call, spec=spec, mask=made)
    return upon(bottom, call, node, bottom, context)


def _operands(condition: Expression) -> list[Expression]:
    """What AND connects in a condition."""
    if condition.nodeName() != "And":
        return [condition]
    return [*_operands(condition.left()), *_operands(condition.right())]


def _filter(conditions: list[Expression], child: Node, context: Context) -> Node:
    return context.catalyst.plans.Filter(functools.reduce(context.catalyst.expressions.And, conditions), child)
