"""Semi and anti joins on a call (EXISTS, IN, NOT EXISTS) ask a left row's pairs until one of them matches.

before                                                     after
------                                                     -----
Filter (pair_number = 1)                                   Filter (pair_number = 1)
+- Window [row_number() AS pair_number], [row_id]          +- Window [row_number() AS pair_number], [row_id]
   +- Filter (a = 'x')                                        +- Filter (a = 'x')
      +- ArrowEvalPython [llm(.., 'p', t, u)], [a]               +- Project [t, u, row_id, g.a0 AS a]
         +- Join Inner                                              +- ArrowEvalPython [llm_group({p; conditions;
            :- Project [t, row_id]                                     :                pair: row_id}, ..)]
            +- Relation [u]                                            +- Join Inner ...

That is the plan that SemanticJoin made. The node gets the condition that makes a pair a match and the id of its left
row. Its tasks ask a left row's pairs in rounds of 1, 2, 4 ... and none any more after a match: at most 2 p - 1 calls
if the p-th pair is the first match, all pairs if there is none (spark_llm/first_match.py). What was not asked is NULL.
Only pairs of a left row with a match are not asked, so whatever the join's condition makes of a NULL, the left row has
a match, as it would have with all pairs asked. ReorderRows keeps a left row's pairs in one task.

Several calls of a condition become one node, if OrderLlmPredicates has not made it: of NOT EXISTS the calls stand
below no filter, and each has a mask instead that says whether those before it hold. Where a part of the condition is
none that a task can evaluate as Spark does, all pairs are asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec

from spark_llm.call import Condition
from spark_llm.optimizer.catalyst.bridge import Expression, Jvm, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, calls_of, rebuilt
from spark_llm.optimizer.rules.conditions import Conjunct, below, condition_conjuncts, conjuncts, needs_all
from spark_llm.optimizer.rules.groups import MOST_CALLS, Answered, group_node, restacked, single_call

NAME = "semanticJoin"


def first_match(plan: Node, context: Context) -> Node:
    """Tell the calls of ``plan`` that judge pairs of a semi or anti join of which left row a pair is."""
    matches = context.catalyst.questions("Matches")
    if plan.isStreaming() or not matches.isAnyIn(plan):
        return plan
    return _rewrite(plan, matches, context)


def _rewrite(node: Node, matches: Jvm, context: Context) -> Node:
    catalyst = context.catalyst
    if not catalyst.holds_call(node):
        return node
    children = items(node.children())
    changed = [_rewrite(child, matches, context) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        node = catalyst.with_children(node, changed)
    found = matches.of(node)
    if found is None:
        return node
    top, bottom, row, judged = found
    return _stopping(node, top, bottom, row, judged, context)


def _stopping(
    node: Node, top: Node, bottom: Node, row: Expression, judged: Expression | None, context: Context
) -> Node:
    """``node``, the filter on the window over ``top``, over calls that stop; itself where they must ask all pairs."""
    calls = calls_of(bottom)
    group = calls[0].group
    if bottom.udfs().size() != 1 or (group is not None and (group.pair is not None or group.limit)):
        return node
    if group is None and single_call(bottom, context) is None:
        return node
    if group is None and judged is not None and (together := _together(bottom, row, judged, context)) is not None:
        return _above(node, together, context)
    conditions = _conditions(top, bottom, calls, judged, context)
    if conditions is None or (group is not None and _sorted(conditions) != _sorted(group.conditions)):
        for call in calls:
            why = "all pairs are asked: what makes one a match is nothing that a task can evaluate as Spark does"
            context.notes.declined(NAME, call.label, why)
        return node
    for call in calls:
        context.notes.fired(NAME, call.label, "of a left row's pairs none is asked after a match")
    catalyst = context.catalyst
    if group is None:
        member = Answered(calls[0], bottom.resultAttrs().head(), calls[0].arguments)
        made = group_node([member], bottom.child(), context, conditions, pair=row)
    else:
        paired = msgspec.structs.replace(group, pair=0)
        made = rebuilt(bottom, [dataclasses.replace(call, group=paired, pair=row) for call in calls], catalyst)
    return _above(node, made, context)


def _above(node: Node, made: Node, context: Context) -> Node:
    """``node`` and what stands below it over ``made``, in place of the first call."""
    above = []
    while not context.catalyst.is_call(node):
        above.append(node)
        node = node.child()
    for old in reversed(above):
        made = context.catalyst.with_children(old, [made])
    return made


def _together(bottom: Node, row: Expression, judged: Expression, context: Context) -> Node | None:
    """The call of ``bottom`` and those below it, whose answers its mask needs, as one node; None if that cannot be."""
    catalyst = context.catalyst
    nodes: list[Node] = []
    calls: dict[int, Call] = {}
    node, least = bottom, 0
    while node.nodeName() == "Project" or catalyst.is_call(node):
        if not catalyst.is_deterministic(node):
            break
        if node.nodeName() != "Project":
            if (call := single_call(node, context)) is None or call.mask is None:
                break
            calls[len(nodes)], least = call, len(nodes)
        nodes.append(node)
        node = node.child()
    nodes = nodes[: least + 1]
    if not 1 < len(calls) <= MOST_CALLS:
        return None
    base = nodes[-1].child()
    numbers = sorted(calls, reverse=True)
    columns = {number: nodes[number].resultAttrs().head() for number in numbers}
    answers = list(columns.values())
    is_implied = catalyst.questions("Matches").isImplied
    mask = calls[least].mask
    found = condition_conjuncts(judged, bottom, base, answers, catalyst)
    rest = [each for each in found if not is_implied(each.below, mask)]
    conditions = [each.condition for each in rest if each.condition is not None and each.answers]
    if len(conditions) != len(rest) or not needs_all(conditions, len(numbers)):
        return None
    members = []
    for number in numbers:
        call, child = calls[number], nodes[number].child()
        # What else a mask asks for, the conditions do.
        masked = condition_conjuncts(call.mask, child, base, answers, catalyst)
        if not all(any(is_implied(each.below, one) for one in (mask, *(c.below for c in rest))) for each in masked):
            return None
        arguments = tuple(below(argument, child, base, catalyst) for argument in (call.prompt, *call.fields))
        if not all(catalyst.has_input(argument, base) for argument in arguments):
            return None
        members.append(Answered(call, columns[number], (*arguments, mask)))
    for member in members:
        context.notes.fired(
            NAME, member.call.label, "one node with the others, asked until a pair of the left row matches"
        )
    replaced: dict[int, Callable[[Node], Node] | None] = dict.fromkeys(calls)
    replaced[least] = lambda child: group_node(members, child, context, conditions, pair=row)
    return restacked(nodes, replaced, columns, context)


def _sorted(conditions: list[Condition] | tuple[Condition, ...]) -> list[str]:
    return sorted(map(str, conditions))


def _conditions(
    top: Node, bottom: Node, calls: list[Call], judged: Expression | None, context: Context
) -> list[Condition] | None:
    """What makes a pair a match, as conditions on the answers; None where there is more to it."""
    catalyst = context.catalyst
    column = bottom.resultAttrs().head()
    answers = [column]
    if calls[0].group is not None:
        answers = [catalyst.expressions.GetStructField(column, call.member, catalyst.none) for call in calls]
    found: list[Conjunct] = []
    node = top
    while not catalyst.is_call(node):
        if node.nodeName() == "Filter":
            found += conjuncts(node, bottom, answers, catalyst)
        node = node.child()
    if judged is not None:
        found += condition_conjuncts(judged, bottom, bottom, answers, catalyst)
    # A row that the mask hides has no answers, so it meets no condition that needs them all.
    masks = [call.mask for call in calls if call.mask is not None]
    is_implied = catalyst.questions("Matches").isImplied
    rest = [each for each in found if not any(is_implied(each.below, mask) for mask in masks)]
    conditions = [each.condition for each in rest if each.condition is not None and each.answers]
    return conditions if len(conditions) == len(rest) and needs_all(conditions, len(calls)) else None
