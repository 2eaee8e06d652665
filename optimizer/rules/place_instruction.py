"""The instruction stands first, or last where several calls ask about the same fields.

before                                                after
------                                                -----
SELECT llm('Positive?', plot, quote),                 each row:  plot: "…"
       llm('Which genre?', plot, quote)                          quote: "…"
                                                                 Positive?            (second call: Which genre?)

Rows of one call share the instruction, so it stands first. Calls that ask about the same fields of the same rows share
the fields, which are longer: then the fields stand first, and the second call finds them computed. Putting them first
costs each row its instruction, so the rule counts tokens where statistics tell them. A prompt that differs by row
(``llm(question, context)``) stands first only if it repeats more than the fields do. System text is always first.

This is a prompt rule: it changes what the model reads (``spark.llm.optimizer.mayChangePrompts``).
"""

from __future__ import annotations

import msgspec

from spark_llm.call import CallSpec, PromptPlan
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, all_calls, change_specs, no_function


def place_instruction(plan: Node, context: Context) -> Node:
    """Decide for each call of ``plan`` with fields where its instruction stands."""
    if not context.may_change_prompts or plan.isStreaming():
        return plan
    calls = [call for call in all_calls(plan, context.catalyst) if _is_open(call)]
    if not calls:
        return plan
    decided: list[tuple[Call, PromptPlan]] = []
    for group in _sharing(calls):
        asked = _distinct(group)
        last, why = _decision(asked, context)
        for call in group:
            later = sum(asked.index(other) > _position(call, asked) for other in asked) if last else 0
            layout = call.spec.prompt or PromptPlan()
            changes = {"instruction_last": last, "instruction_why": why, "later_calls": later}
            decided.append((call, msgspec.structs.replace(layout, **changes)))

    def changed(call: Call) -> CallSpec:
        # A call that stands twice in the plan (a CTE used twice) has one decision.
        found = next((layout for other, layout in decided if other.udf.semanticEquals(call.udf)), None)
        return call.spec if found is None else msgspec.structs.replace(call.spec, prompt=found)

    return change_specs(plan, context.catalyst, changed, no_function)


def _is_open(call: Call) -> bool:
    is_decided = call.spec.prompt is not None and bool(call.spec.prompt.instruction_why)
    return bool(call.fields) and call.spec.order != "as_written" and not is_decided


def _sharing(calls: list[Call]) -> list[list[Call]]:
    """Calls by model, system text and fields: those whose prompts could begin alike."""
    groups: list[list[Call]] = []
    for call in calls:
        for group in groups:
            first = group[0]
            same_frame = (first.spec.model, first.spec.system) == (call.spec.model, call.spec.system)
            if same_frame and first.has_fields_of(call):
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _distinct(group: list[Call]) -> list[Call]:
    """The calls of a group that ask something else than one before."""
    found: list[Call] = []
    for call in group:
        if not any(_asks_alike(call, other) for other in found):
            found.append(call)
    return found


def _asks_alike(call: Call, other: Call) -> bool:
    return bool(call.prompt.semanticEquals(other.prompt)) and call.spec == other.spec


def _position(call: Call, asked: list[Call]) -> int:
    return next(position for position, other in enumerate(asked) if _asks_alike(call, other))


def _decision(calls: list[Call], context: Context) -> tuple[bool, str]:
    """Do the fields stand first, and why?"""
    first = calls[0]
    if len(calls) == 1 and first.has_constant_prompt:
        return False, "first: all rows share it"
    known = context.statistics.of(first, context)
    if len(calls) == 1:
        return _varying(first, known.prompt, known.columns)
    if not all(call.has_constant_prompt for call in calls):
        return True, f"last: {len(calls)} calls share their fields"
    instructions = sum(context.lengths(first.spec.model)([call.prompt_text for call in calls]))
    if (length := known.row_length) is not None and instructions >= (len(calls) - 1) * length:
        return False, (
            f"first: {len(calls)} calls share {length:.0f} tokens of fields, but their instructions have {instructions}"
        )
    return True, f"last: {len(calls)} calls share their fields"


def _varying(call: Call, prompt: object, columns: object) -> tuple[bool, str]:
    from spark_llm.optimizer.statistics import ColumnCounts

    assert isinstance(columns, tuple)
    asked = prompt.distinct if isinstance(prompt, ColumnCounts) else None
    fields = [column.distinct for column in columns]
    if asked is None or not fields or None in fields:
        return False, "first: nothing is known of how often prompts repeat"
    fewest = min(count for count in fields if count is not None)
    if fewest < asked:
        return True, f"last: {asked:,} different prompts, but a field has {fewest:,} values"
    return False, f"first: {asked:,} different prompts, no field has fewer values"
