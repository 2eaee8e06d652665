"""The instruction stands first, or last where several calls ask about the same fields.

before                                                after
------                                                -----
SELECT llm('Positive?', plot, quote),                 each row:  plot: "…"
       llm('Which genre?', plot, quote)                          quote: "…"
                                                                 Positive?            (second call: Which genre?)

Rows of one call share the instruction, so it stands first. Calls that ask about the same fields of the same rows share
the fields, which are longer: then the fields stand first, and the second call finds them computed. Putting them first
costs each row its instruction, so the rule counts tokens where statistics tell them. A prompt that differs by row
(``llm(question, context)``) stands first only if it shares more tokens than a field would in its place. System text is
always first.

This is a prompt rule: it changes what the model reads (``spark.llm.optimizer.mayChangePrompts``).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from spark_llm.call import CallSpec, PromptPlan
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.reorder.counts import order_by_counts
from spark_llm.optimizer.rules.calls import Call, all_calls, change_specs, decided_calls, no_function
from spark_llm.optimizer.statistics import ColumnCounts, InputStatistics


def place_instruction(plan: Node, context: Context) -> Node:
    """Decide for each call of ``plan`` with fields where its instruction stands."""
    if not context.may_change_prompts or plan.isStreaming():
        return plan
    calls = [call for call in all_calls(plan, context.catalyst) if _is_open(call)]
    if not calls:
        return plan
    decided: list[tuple[Call, PromptPlan]] = []
    before = [call for call in decided_calls(plan, context.catalyst) if not _is_open(call)]
    for namesakes in _grouped(calls, _have_one_frame):
        known = next((call.spec.prompt for call in before if _have_one_frame(call, namesakes[0])), None)
        for group, (last, why) in _decisions(namesakes, known, context):
            asked = _distinct(group)
            for call in group:
                later = sum(asked.index(other) > _position(call, asked) for other in asked) if last else 0
                layout = call.spec.prompt or PromptPlan()
                changes = {"instruction_last": last, "instruction_why": why, "later_calls": later}
                decided.append((call, msgspec.structs.replace(layout, **changes)))

    def changed(call: Call) -> CallSpec:
        # A call that stands twice in the plan (a CTE used twice) has one decision.
        found = next(
            (layout for other, layout in decided if other.member == call.member and other.udf.semanticEquals(call.udf)),
            None,
        )
        return call.spec if found is None else msgspec.structs.replace(call.spec, prompt=found)

    return change_specs(plan, context.catalyst, changed, no_function)


def _is_open(call: Call) -> bool:
    is_decided = call.spec.prompt is not None and bool(call.spec.prompt.instruction_why)
    return bool(call.fields) and call.spec.order != "as_written" and not is_decided


def _grouped(calls: list[Call], are_alike: Callable[[Call, Call], bool]) -> list[list[Call]]:
    groups: list[list[Call]] = []
    for call in calls:
        for group in groups:
            if are_alike(group[0], call):
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _have_one_frame(one: Call, other: Call) -> bool:
    """Have both the same model, system text and field names, so that equal arguments may occur in both?"""
    frames = [(call.spec.model, call.spec.system, sorted(call.names)) for call in (one, other)]
    return frames[0] == frames[1]


def _decisions(
    namesakes: list[Call], known: PromptPlan | None, context: Context
) -> list[tuple[list[Call], tuple[bool, str]]]:
    """The calls by their fields, with what is decided: one thing for all, as equal arguments have equal prompts in a
    query (CONTRACTS.md 1), whichever rows they come from. known: what is decided already for such calls of a subquery.
    """
    if known is not None:
        return [(namesakes, (known.instruction_last, known.instruction_why))]
    groups = _grouped(namesakes, lambda one, other: one.has_fields_of(other, context.catalyst))
    found = [_decision(_distinct(group), context) for group in groups]
    if any(last for last, _ in found):
        found = [(True, why if last else "last: as in other calls with fields of these names") for last, why in found]
    return list(zip(groups, found, strict=True))


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
        return _varying(first, known)
    if not all(call.has_constant_prompt for call in calls):
        return True, f"last: {len(calls)} calls share their fields"
    instructions = sum(context.lengths(first.spec)([call.prompt_text for call in calls]))
    if (length := known.row_length) is not None and instructions >= (len(calls) - 1) * length:
        return False, (
            f"first: {len(calls)} calls share {length:.0f} tokens of fields, but their instructions have {instructions}"
        )
    return True, f"last: {len(calls)} calls share their fields"


def _varying(call: Call, known: InputStatistics) -> tuple[bool, str]:
    """For a prompt that differs by row: which shares more if it stands first, the prompt or one of the fields?"""
    columns = [known.prompt or ColumnCounts(), *known.columns]
    distinct = [column.distinct for column in columns if column.distinct is not None]
    lengths = [column.length for column in columns if column.length is not None]
    if known.rows is None or len(distinct) < len(columns) or len(lengths) < len(columns):
        return False, "first: nothing is known of how often prompts repeat"
    order, _ = order_by_counts(known.rows, distinct, lengths, [column.table for column in columns])
    if order[0] == 0:
        return False, f"first: {distinct[0]:,} different prompts in {known.rows:,} rows, no field shares more"
    name = call.names[order[0] - 1]
    return True, f"last: {distinct[0]:,} different prompts, but {distinct[order[0]]:,} of {name}"
