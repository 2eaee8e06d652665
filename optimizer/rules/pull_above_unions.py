"""One node for a call that stands in all branches of a UNION: the half of AggregateDistinct that makes equal rows meet.

before                                              after
------                                              -----
Union                                               Project [id, pythonUDF0 AS r]
:- Project [id, pythonUDF0 AS r]                    +- ArrowEvalPython [llm(.., 'p', _llm0)], [pythonUDF0]
:  +- ArrowEvalPython [llm(.., 'p', text)]             +- Union
:     +- Relation [id, text]                              :- Project [id, text AS _llm0]
+- Project [k, pythonUDF0 AS r]                           :  +- Relation [id, text]
   +- ArrowEvalPython [llm(.., 'p', note)]                +- Project [k, note AS _llm0]
      +- Relation [k, note]                                  +- Relation [k, note]

Only where all branches make the same of the answers, at the same positions.
"""

from __future__ import annotations

import dataclasses

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.placing import (
    arguments_of,
    chain,
    column,
    filtered,
    project,
    references,
    renamed,
    with_arguments,
)
from spark_llm.optimizer.rules.calls import calls_of, literal_text


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A branch of a Union over the columns below its topmost call, ``node``.

    entries: what it gives. conditions: those of its filters on answers; early: the others.
    """

    node: Node
    entries: list[Expression]
    conditions: list[Expression]
    early: list[Expression]
    late: list[int]  # positions of entries that are made of answers


def pull_above_unions(plan: Node, context: Context) -> Node:
    """``plan`` with each call that all branches of a Union end with above it."""
    catalyst = context.catalyst
    if not catalyst.holds_call(plan):
        return plan
    children = items(plan.children())
    changed = [pull_above_unions(child, context) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        plan = catalyst.with_children(plan, changed)
    if plan.nodeName() != "Union" or (pulled := _pulled(plan, context)) is None:
        return plan
    return pull_above_unions(pulled, context)


def _pulled(union: Node, context: Context) -> Node | None:
    catalyst = context.catalyst
    if union.byName() or union.allowMissingCol():
        return None
    branches = [_branch(child, catalyst) for child in items(union.children())]
    known = [branch for branch in branches if branch is not None]
    if len(known) < max(2, len(branches)) or any(not _are_alike(known[0], branch, catalyst) for branch in known[1:]):
        return None
    first = known[0]
    arguments = [arguments_of(branch.node) for branch in known]
    is_constant = [all(argument.foldable() for argument in column) for column in zip(*arguments, strict=True)]
    numbers = [n for n, constant in enumerate(is_constant) if not constant]
    children = []
    for branch, own in zip(known, arguments, strict=True):
        carried = [catalyst.named(own[n], f"_llm{n}") for n in numbers]
        early = [entry for position, entry in enumerate(branch.entries) if position not in first.late]
        children.append(project([*early, *carried], filtered(branch.early, branch.node.child(), catalyst), catalyst))
    joined = catalyst.with_children(union, children)
    given = items(joined.output())
    asked = list(arguments[0])
    for n, attribute in zip(numbers, given[len(given) - len(numbers) :], strict=True):
        asked[n] = attribute
    above = filtered(first.conditions, with_arguments(first.node, asked, joined, catalyst), catalyst)
    rest = iter(given)
    final = [
        _late_column(first, position, attribute, catalyst) if position in first.late else next(rest)
        for position, attribute in enumerate(items(union.output()))
    ]
    label = calls_of(first.node)[0].label
    context.notes.fired("aggregateDistinct", label, f"one node above a union of {len(known)} instead of one in each")
    return project(final, above, catalyst)


def _late_column(branch: _Branch, position: int, attribute: Expression, catalyst: Catalyst) -> Expression:
    value = _value(branch.entries[position])
    if attribute.nullable() and not value.nullable():  # only the first branch drops NULLs
        answers = items(branch.node.resultAttrs())
        value = renamed(value, answers, answers, catalyst)
    return column(value, attribute, catalyst)


def _branch(plan: Node, catalyst: Catalyst) -> _Branch | None:
    between = chain(plan, catalyst)
    node = between.bottom
    if not catalyst.is_call(node):
        return None
    calls = calls_of(node)
    if not all(call.spec.is_repeatable and call.udf.deterministic() for call in calls) or any(
        call.group is not None and call.group.limit for call in calls
    ):
        return None
    answers = references(items(node.resultAttrs()), catalyst)
    entries = [column(between.inlined(a, catalyst), a, catalyst) for a in items(plan.output())]
    conditions = between.conditions(catalyst)
    on_answers = [bool(references([condition], catalyst) & answers) for condition in conditions]
    late = [position for position, entry in enumerate(entries) if references([entry], catalyst) & answers]
    needed = [*(entries[p] for p in late), *(c for c, is_late in zip(conditions, on_answers, strict=True) if is_late)]
    if not references(needed, catalyst) <= answers:
        return None
    return _Branch(
        node,
        entries,
        [c for c, is_late in zip(conditions, on_answers, strict=True) if is_late],
        [c for c, is_late in zip(conditions, on_answers, strict=True) if not is_late],
        late,
    )


def _are_alike(one: _Branch, other: _Branch, catalyst: Catalyst) -> bool:
    """Do both ask the same with columns of the same types, and make the same of the answers?"""
    if one.late != other.late or len(one.conditions) != len(other.conditions):
        return False
    udfs, others = (items(branch.node.udfs()) for branch in (one, other))
    if len(udfs) != len(others):
        return False
    for udf, its in zip(udfs, others, strict=True):
        (spec, *mine), (its_spec, *theirs) = items(udf.children()), items(its.children())
        if udf.name() != its.name() or literal_text(spec) != literal_text(its_spec) or len(mine) != len(theirs):
            return False
        for argument, its_argument in zip(mine, theirs, strict=True):
            both_constant = argument.foldable() and its_argument.foldable()
            if both_constant and not argument.semanticEquals(its_argument):
                return False
            if not argument.dataType().equals(its_argument.dataType()):
                return False
    olds, news = items(other.node.resultAttrs()), items(one.node.resultAttrs())
    mine = [*one.conditions, *(_value(one.entries[p]) for p in one.late)]
    theirs = [*other.conditions, *(_value(other.entries[p]) for p in other.late)]
    return all(renamed(its, olds, news, catalyst).semanticEquals(own) for own, its in zip(mine, theirs, strict=True))


def _value(entry: Expression) -> Expression:
    return entry.child() if entry.nodeName() == "Alias" else entry
