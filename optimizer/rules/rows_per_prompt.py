"""Pairs of a left row share prompts, where the user says how many (``spark.llm.join.rowsPerPrompt``).

before                                          after
------                                          -----
Filter (a = 'yes')                              Filter (a = 'yes')
+- ArrowEvalPython [llm({..}, 'p', t, u)], [a]  +- ArrowEvalPython [llm({.., "prompt": {"rows": 8, "left": [0]}}, ..)]
   +- Join Inner                                   +- Join Inner ...
      :- Relation [t]
      +- Relation [u]

The spec gets the number of rows and which fields are the left row's; these stand first in every prompt of the call, so
that a left row's pairs become neighbours. The task puts the pairs of a window together (spark_llm/shared_prompt.py).
Only calls that decide which pairs of a join are kept, right above it, are changed. This is a prompt rule: it changes
what the model reads, so ``mayChangePrompts`` and a call's ``order => 'as_written'`` keep it away.
"""

from __future__ import annotations

import msgspec

from spark_llm.call import CallSpec, PromptPlan
from spark_llm.optimizer.catalyst.bridge import Expression, Node, elements, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, calls_of, change_specs, no_function

NAME = "semanticJoin"


def rows_per_prompt(plan: Node, context: Context) -> Node:
    """Tell the calls of ``plan`` that judge pairs how many of them may share a prompt."""
    if context.rows_per_prompt < 2 or plan.isStreaming():
        return plan
    decided: list[tuple[Call, PromptPlan]] = []
    for node, join, columns, values, _ in elements(context.catalyst.questions("Pairs").judges(plan)):
        for call in calls_of(node):
            layout = _layout(call, join, columns, values, context)
            if layout is not None:
                decided.append((call, layout))

    def changed(call: Call) -> CallSpec:
        found = next(
            (layout for other, layout in decided if other.member == call.member and other.udf.semanticEquals(call.udf)),
            None,
        )
        return call.spec if found is None else msgspec.structs.replace(call.spec, prompt=found)

    return change_specs(plan, context.catalyst, changed, no_function) if decided else plan


def _layout(call: Call, join: Node, columns: Node, values: Node, context: Context) -> PromptPlan | None:
    """The call's prompts with several rows; None where it has none, or has them already."""
    catalyst = context.catalyst
    known = call.spec.prompt or PromptPlan()
    if known.rows:
        return None
    renamed = catalyst.questions("Pairs").renamed
    fields: list[Expression] = [renamed(field, columns, values) for field in call.fields]
    left_side, right_side = items(join.children())
    left = tuple(number for number, field in enumerate(fields) if catalyst.has_input(field, left_side))
    if not left or len(left) == len(fields) or not all(catalyst.has_input(field, join) for field in fields):
        return None
    if all(catalyst.has_input(field, right_side) for field in fields):
        return None
    why = _why_not(call, context)
    if why:
        context.notes.declined(NAME, call.label, f"a pair a prompt: {why}")
        return None
    context.notes.fired(NAME, call.label, f"up to {context.rows_per_prompt} right rows share a prompt")
    before = known.fields or tuple(range(len(fields)))
    order = tuple(sorted(before, key=lambda number: number not in left))
    told = known.fields_why
    if told and (order != before or known.table is not None):
        told += "; then those of the left row first, whose pairs share prompts"
    changes = {"fields": order, "table": None, "fields_why": told}
    return msgspec.structs.replace(known, rows=context.rows_per_prompt, left=left, **changes)


def pairs_per_prompt(call: Call, context: Context) -> int:
    """How many pairs of a join may share a prompt of ``call``, if it judges them."""
    return 1 if _why_not(call, context) else context.rows_per_prompt


def _why_not(call: Call, context: Context) -> str:
    if not context.may_change_prompts:
        return "spark.llm.optimizer.mayChangePrompts is false"
    if call.spec.answer is not None or call.spec.details:
        return "its answers have a type, or details"
    if call.spec.order == "as_written":
        return "order => 'as_written'"
    if not (call.spec.is_repeatable and bool(call.udf.deterministic())):
        return "its answers are drawn without a seed"
    return ""
