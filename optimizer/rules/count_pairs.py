"""How many pairs a join on a call would ask about, before the first call; more than ``spark.llm.join.maxPairs`` fail.

The pairs are what the join's other conditions, and cheap filters, leave. They are counted by Spark jobs where the sides
are cheap to read (statistics/joins.py): the rows of each side, and those of the join only where their product is too
many. Where nothing may be counted, and Spark has no estimate, the query runs; its budget guards it.
"""

from __future__ import annotations

import functools

from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.bridge import Expression, Node, elements, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.runner import Refusal
from spark_llm.optimizer.rules.calls import Call, calls_of
from spark_llm.optimizer.rules.rows_per_prompt import pairs_per_prompt
from spark_llm.optimizer.statistics.joins import Key, Question, count_tuples

NAME = "semanticJoin"
_TOKENS_PER_BYTE = 0.25


def count_pairs(plan: Node, context: Context) -> Node:
    """``plan`` as it is. Raises Refusal with LLM_TOO_MANY_PAIRS."""
    if not context.max_pairs or context.explaining or plan.isStreaming():
        return plan
    for node, join, columns, values, conditions in elements(context.catalyst.questions("Pairs").judges(plan)):
        for call in calls_of(node):
            # As statistics/sides.py asks for them, so that they are counted once.
            arguments = _at_join([*call.fields, call.prompt], columns, values, context)
            masks = _at_join([] if call.mask is None else [call.mask], columns, values, context)
            if _spans_both(arguments, join, context):
                _check(call, join, arguments, [*conditions, *masks], context)
    return plan


def _at_join(expressions: list[Expression], columns: Node, values: Node, context: Context) -> list[Expression]:
    """The expressions as ones of the join's columns."""
    return [context.catalyst.questions("Pairs").renamed(each, columns, values) for each in expressions]


def _spans_both(arguments: list[Expression], join: Node, context: Context) -> bool:
    has_input = context.catalyst.has_input
    return all(has_input(each, join) for each in arguments) and all(
        not all(has_input(each, side) for each in arguments) for side in items(join.children())
    )


def _check(call: Call, join: Node, arguments: list[Expression], conditions: list[Expression], context: Context) -> None:
    catalyst = context.catalyst
    clean = catalyst.questions("Pairs").withoutRowIds(join)
    constant = Key((catalyst.number(0),))
    sides = []
    for side in items(clean.children()):
        own = tuple(each for each in arguments if not each.foldable() and catalyst.has_input(each, side))
        sides.append(Question(side, (Key(own) if own else constant,)))
    counted = count_tuples(sides, context)
    if counted is None:
        context.notes.declined(NAME, call.label, "its pairs cannot be counted: its sides are dear to read")
        return
    pairs = counted[0].rows * counted[1].rows
    if pairs > context.max_pairs:
        kept = [each for each in conditions if each.deterministic() and catalyst.has_input(each, clean)]
        if clean.condition().isDefined() or kept:
            filtered = catalyst.plans.Filter(functools.reduce(catalyst.expressions.And, kept), clean) if kept else clean
            left = count_tuples([Question(filtered, (constant,))], context)
            if left is None:
                context.notes.declined(
                    NAME, call.label, f"of {pairs:,} pairs nobody knows how many its conditions leave"
                )
                return
            pairs = left[0].rows
    if pairs <= context.max_pairs:
        context.notes.fired(NAME, call.label, f"asks about at most {pairs:,} pairs")
        return
    left_text, right_text = ((side.row_bytes or 0.0) * _TOKENS_PER_BYTE for side in counted)
    labels = context.lengths(call.spec)(["\n".join([call.prompt_text, *(f"{name}: " for name in call.names)])])[0]
    length = round(pairs * ((labels + left_text) / pairs_per_prompt(call, context) + right_text))
    raise Refusal(
        LlmError("LLM_TOO_MANY_PAIRS", pairs=f"{pairs:,}", length=f"{length:,}", limit=f"{context.max_pairs:,}")
    )
