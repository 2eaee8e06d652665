"""The calls of a finished plan in words: where each stands, what rules did about it, what it is expected to cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spark_llm.call import PromptPlan, RowPlan
from spark_llm.config import LlmConf
from spark_llm.explaining import CallExplanation, RuleNote
from spark_llm.optimizer.catalyst.bridge import Catalyst, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.notes import Note
from spark_llm.optimizer.estimates import CallEstimate, estimates
from spark_llm.optimizer.rules.calls import Call, calls_of
from spark_llm.udf import PROMPT_CHARACTERS, varying_label

_PROMPT_RULES = ("placeInstruction", "reorderColumns")
_ABOVE = {
    "Aggregate": "an aggregation",
    "Filter": "a filter",
    "GlobalLimit": "a limit",
    "Join": "a join",
    "Sort": "a sort",
    "Union": "a union",
    "Window": "a window",
}
_TABLES = {
    "InMemoryRelation": "a cached table",
    "LocalRelation": "local rows",
    "LogicalRDD": "an RDD",
    "OneRowRelation": "one row",
    "Range": "a range",
}


def described(
    plan: Node, noted: Sequence[Note], rules: Sequence[str], conf: LlmConf, context: Context
) -> tuple[list[tuple[CallExplanation, str]], list[RuleNote]]:
    """The calls of ``plan``, each with the name that reports have for it; and notes that are about none of them.

    noted: what the rules said when they made the plan. rules: those that are switched on.
    """
    places = [place for each in [*items(plan.subqueriesAll()), plan] for place in _places(each, context.catalyst)]
    labels = {call.label for call, _ in places}
    about_query = [RuleNote(rule=n.rule, fired=n.fired, why=n.why) for n in noted if n.call not in labels]
    found = []
    for estimate, (call, above) in zip(estimates(plan, context), places, strict=True):
        notes = _of_call(call, noted, rules, conf)
        idle = [rule for rule in rules if rule not in {note.rule for note in (*notes, *about_query)}]
        explained = CallExplanation(
            prompt=varying_label(call.spec) if call.spec.task == "embed" and not call.prompt_text else call.label,
            placement=_placement(estimate, above, context.catalyst),
            estimate=estimate.cost,
            source=estimate.source,
            notes=notes,
            idle=idle,
            embeds=call.spec.task == "embed",
        )
        found.append((explained, call.prompt_text[:PROMPT_CHARACTERS] or varying_label(call.spec)))
    return found, about_query


def _places(plan: Node, catalyst: Catalyst, above: tuple[Node, ...] = ()) -> Iterator[tuple[Call, tuple[Node, ...]]]:
    """The calls in the order of ``all_calls``, with the nodes above them, the nearest first."""
    if not catalyst.holds_call(plan):
        return
    for child in items(plan.children()):
        yield from _places(child, catalyst, (plan, *above))
    if catalyst.is_call(plan):
        for call in calls_of(plan):
            yield call, above


# What the rules did


def _of_call(call: Call, noted: Sequence[Note], rules: Sequence[str], conf: LlmConf) -> list[RuleNote]:
    """Notes about a call in the order of the rules; why a rule did nothing only where it did nothing at all."""
    said = [(n.rule, n.fired, n.why) for n in noted if n.call == call.label] + _decided(call, conf)
    fired = {rule for rule, has_fired, _ in said if has_fired}
    kept = [
        RuleNote(rule=rule, fired=has_fired, why=why)
        for rule, has_fired, why in dict.fromkeys(said)
        if rule in rules and (has_fired or rule not in fired)
    ]
    return sorted(kept, key=lambda note: rules.index(note.rule))


def _decided(call: Call, conf: LlmConf) -> list[tuple[str, bool, str]]:
    """What rules have written into the call's spec."""
    layout, rows = call.spec.prompt or PromptPlan(), call.spec.rows or RowPlan()
    found = []
    if call.spec.order == "as_written" or not conf.may_change_prompts:
        why = "order => 'as_written'" if conf.may_change_prompts else "spark.llm.optimizer.mayChangePrompts is false"
        found += [(rule, False, why) for rule in _PROMPT_RULES if len(call.fields) > (rule == "reorderColumns")]
    if layout.instruction_why:
        found.append(("placeInstruction", layout.instruction_last, layout.instruction_why))
    if layout.fields_why:
        found.append(("reorderColumns", bool(layout.fields or layout.table), layout.fields_why))
    if rows.fold or rows.fold_why:
        found.append(("deduplicatePrompts", rows.fold, rows.fold_why or "rows with equal arguments are asked once"))
    if rows.order_why:
        found.append(("reorderRows", rows.is_sorted, rows.order_why))
    return found


# Where a call stands


def _placement(estimate: CallEstimate, above: Sequence[Node], catalyst: Catalyst) -> str:
    call = estimate.call
    words = [f"asked for the rows of {_rows(call.node.child(), catalyst)}"]
    if call.spec.task == "embed" and call.has_constant_prompt:
        words = ["asked once for the query"]
    if call.mask is not None:
        words.append("where its mask holds")
    if call.group is not None:
        others = len(call.group.calls) - 1
        shared = f"in one node with {others} other call{'s' * (others > 1)}" if others else ""
        kept = "until a condition drops them" if call.group.conditions and others else ""
        limit = f"until {call.group.limit:,} rows are kept" if call.group.limit else ""
        words += [part for part in (shared, kept, limit) if part]
    used = [words_of for node in above if (words_of := _use(node))]
    if used:
        words.append("below " + ", ".join(dict.fromkeys(used)))
    if estimate.is_repeated:
        words.append("whose answers an equal call before it has")
    return ", ".join(words)


def _use(node: Node) -> str | None:
    """What a node above a call does, where it is worth a word."""
    name = str(node.nodeName())
    if name == "Sort" and not getattr(node, "global")():  # ReorderRows' own
        return None
    return _ABOVE.get(name)


def _rows(node: Node, catalyst: Catalyst) -> str:
    """The rows of a node, by its tables and what makes them more or fewer."""
    name = str(node.nodeName())
    children = items(node.children())
    if not children:
        return _table(node, name)
    if len(children) > 1:
        joint = " joined with " if name == "Join" else " and "
        return joint.join(_rows(child, catalyst) for child in children)
    below = _rows(children[0], catalyst)
    if name == "Filter" and not catalyst.only_drops_nulls(node):
        return below if below.endswith(", filtered") else f"{below}, filtered"
    if name == "Aggregate":
        return f"{below}, grouped"
    if name == "GlobalLimit":
        return f"{below}, limited"
    return below


def _table(leaf: Node, name: str) -> str:
    if name.startswith("LogicalRelation") or name == "Relation":
        table = leaf.catalogTable()
        return str(table.get().identifier().table()) if table.isDefined() else "files"
    if name == "HiveTableRelation":
        return str(leaf.tableMeta().identifier().table())
    return _TABLES.get(name, name)
