"""GROUP BY, DISTINCT and counts over a call ask about distinct inputs and carry how often each occurs.

before                                              after
------                                              -----
Aggregate [r], [r, count(1) AS n]                   Aggregate [r], [r, coalesce(sum(_llm_n), 0) AS n]
+- Project [pythonUDF0 AS r]                        +- Project [pythonUDF0 AS r, _llm_n]
   +- ArrowEvalPython [llm(.., 'p', text)]             +- ArrowEvalPython [llm(.., 'p', text)]
      +- Relation [text]                                  +- Aggregate [text], [text, count(1) AS _llm_n]
                                                             +- Relation [text]

Rows are grouped by the columns that the call, filters on its answer and the rest of the upper aggregate need; what the
upper aggregate makes of other columns alone is made below already, and put together above (sums of whole numbers and
decimals, counts, averages of whole numbers, minima and maxima). An aggregate that would come out otherwise by a bit
(sums of floating-point numbers), or depends on an order, keeps the rule out, and so do rows that hardly repeat.

The same call in all branches of a UNION becomes one node above it first (pull_above_unions.py).
"""

from __future__ import annotations

import dataclasses

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.placing import (
    arguments_of,
    column,
    filtered,
    is_plain,
    is_unique,
    project,
    references,
    with_arguments,
)
from spark_llm.optimizer.rules.calls import Call, calls_of
from spark_llm.optimizer.rules.partial_aggregates import take_apart
from spark_llm.optimizer.rules.pull_above_unions import pull_above_unions
from spark_llm.optimizer.statistics.joins import Key, Question, count_tuples

NAME = "aggregateDistinct"
_FOLDS = 0.8  # distinct tuples a row from which grouping them is not worth a shuffle
# Equal values of other types may be different texts: -0.0 and 0.0, strings with a collation.
_GROUPED_TYPES = {"string", "boolean", "tinyint", "smallint", "int", "bigint", "date", "timestamp", "binary"}


@dataclasses.dataclass(frozen=True)
class Stack:
    """What stands between an Aggregate and the input of the lowest call below it.

    nodes: Projects, Filters and nodes of calls, from the top down; the last one is of calls. input: what is below.
    """

    nodes: list[Node]
    input: Node


def aggregate_distinct(plan: Node, context: Context) -> Node:
    """Aggregate rows with equal inputs below the calls of ``plan`` whose answers are aggregated."""
    return plan if plan.isStreaming() else _rewrite(pull_above_unions(plan, context), context)


def _rewrite(plan: Node, context: Context) -> Node:
    catalyst = context.catalyst
    if not catalyst.holds_call(plan):
        return plan
    children = items(plan.children())
    changed = [_rewrite(child, context) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        plan = catalyst.with_children(plan, changed)
    if plan.nodeName() != "Aggregate" or (stack := _stack(plan.child(), context)) is None:
        return plan
    calls = [call for node in stack.nodes if catalyst.is_call(node) for call in calls_of(node)]
    if any(call.group is not None and call.group.limit for call in calls):
        return plan
    found = _grouped(plan, stack, calls, context)
    if isinstance(found, str):
        before = (note for note in context.notes.all() if note.rule == NAME and note.call == calls[0].label)
        if not any(note.fired for note in before):  # rules run until nothing changes any more
            context.notes.declined(NAME, calls[0].label, found)
        return plan
    return found


def _stack(node: Node, context: Context) -> Stack | None:
    nodes: list[Node] = []
    found = None
    while True:
        is_call = context.catalyst.is_call(node)
        if not is_call and not (node.nodeName() in ("Project", "Filter") and is_plain(node, context.catalyst)):
            return found
        nodes.append(node)
        node = node.child()
        if is_call:
            found = Stack(list(nodes), node)


def _grouped(aggregate: Node, stack: Stack, calls: list[Call], context: Context) -> Node | str:
    """The aggregate over distinct inputs, or in words why not."""
    catalyst = context.catalyst
    if not all(call.spec.is_repeatable and call.udf.deterministic() for call in calls):
        return "answers are drawn without a seed: each row has its own"
    if not catalyst.is_deterministic(aggregate):
        return "the aggregate is not deterministic"
    answers = references((a for n in stack.nodes if catalyst.is_call(n) for a in items(n.resultAttrs())), catalyst)
    taken = take_apart(aggregate, lambda each: _over_input(each, stack, -1, catalyst), answers, catalyst)
    if isinstance(taken, str):
        return taken
    result = catalyst.questions("Aggregates").replaced(aggregate, catalyst.seq(taken.olds), catalyst.seq(taken.news))
    made = {int(alias.exprId().id()) for alias in taken.made}
    wanted = references([*items(aggregate.groupingExpressions()), *items(result)], catalyst) - made
    entries = [
        column(_over_input(attribute, stack, -1, catalyst), attribute, catalyst)
        for attribute in items(aggregate.child().output())
        if int(attribute.exprId().id()) in wanted
    ]
    inputs = _Inputs(stack.input, answers, catalyst)
    late = [entry for entry in entries if inputs.is_late(entry)]
    for entry in entries:
        inputs.need(entry)
    steps, conditions = _steps(stack, inputs)
    columns = [entry if catalyst.is_attribute(entry) else entry.child() for entry in inputs.keys.values()]
    if not columns:
        return "no argument differs by row"
    if any(not _can_group(entry) for entry in columns):
        return "a column that it would group by has a type whose equal values may differ"
    below = filtered(conditions, stack.input, catalyst)
    if is_unique(below, columns, catalyst):
        return "no two rows below the call are equal"
    known = count_tuples([Question(below, (Key(tuple(columns)),))], context)
    numbers = "nothing is counted"
    if known is not None:
        numbers = f"{known[0].distinct[0]:,} in {known[0].rows:,} rows"
        if known[0].distinct[0] >= _FOLDS * known[0].rows:
            return f"rows below the call hardly repeat: {numbers} are distinct"
    context.notes.fired(NAME, calls[0].label, f"distinct inputs are counted below the call: {numbers}")

    plan = _counted(below, list(inputs.keys.values()), taken.made, catalyst)
    for node, expressions in steps:
        if catalyst.is_call(node):
            plan = with_arguments(node, expressions, plan, catalyst)
        else:
            plan = filtered(expressions, plan, catalyst)
    if any(not catalyst.is_attribute(entry) for entry in late):
        early = [entry.toAttribute() for entry in entries if not any(entry is each for each in late)]
        columns_above = [*early, *late, *(alias.toAttribute() for alias in taken.made)]
        plan = catalyst.plans.Project(catalyst.seq(columns_above), plan)
    return catalyst.questions("Aggregates").aggregate(aggregate.groupingExpressions(), result, plan)


class _Inputs:
    """The columns that distinct inputs consist of: ``keys``, by id, attributes of ``below`` or aliases over it."""

    def __init__(self, below: Node, answers: set[int], catalyst: Catalyst) -> None:
        self.keys: dict[int, Expression] = {}
        self._given = {int(attribute.exprId().id()): attribute for attribute in items(below.output())}
        self._answers = answers
        self._catalyst = catalyst

    def is_late(self, expression: Expression) -> bool:
        """Does it need an answer?"""
        return bool(references([expression], self._catalyst) & self._answers)

    def need(self, expression: Expression) -> Expression:
        """What stands for ``expression`` above the distinct inputs: a column that is made below where it can be."""
        if expression.foldable():
            return expression
        if self.is_late(expression):
            for identity in references([expression], self._catalyst) - self._answers:
                self.keys.setdefault(identity, self._given[identity])
            return expression
        if not self._catalyst.is_attribute(expression) and expression.nodeName() != "Alias":
            known = (k for k in self.keys.values() if k.nodeName() == "Alias" and k.child().semanticEquals(expression))
            expression = next(known, None) or self._catalyst.named(expression, f"_llm{len(self.keys)}")
        self.keys.setdefault(int(expression.exprId().id()), expression)
        return expression.toAttribute()


def _steps(stack: Stack, inputs: _Inputs) -> tuple[list[tuple[Node, list[Expression]]], list[Expression]]:
    """The stack's calls with their columns and its Filters with their conditions, from the bottom up; and conditions on
    no answer, which come before all."""
    catalyst = inputs._catalyst
    steps: list[tuple[Node, list[Expression]]] = []
    before: list[Expression] = []
    for position in range(len(stack.nodes) - 1, -1, -1):
        node = stack.nodes[position]
        if catalyst.is_call(node):
            found = [_over_input(argument, stack, position, catalyst) for argument in arguments_of(node)]
            steps.append((node, [inputs.need(argument) for argument in found]))
        elif node.nodeName() == "Filter":
            condition = _over_input(node.condition(), stack, position, catalyst)
            if inputs.is_late(condition):
                steps.append((node, [inputs.need(condition)]))
            else:
                before.append(condition)
    return steps, before


def _counted(below: Node, keys: list[Expression], made: list[Expression], catalyst: Catalyst) -> Node:
    """``below`` grouped by the keys, with what is made of the rows of a group."""
    given = {int(key.exprId().id()) for key in keys}
    needed = references(made, catalyst) - given
    if any(not catalyst.is_attribute(key) for key in keys):
        others = [a for a in items(below.output()) if int(a.exprId().id()) in needed]
        below = project([*keys, *others], below, catalyst)
    columns = [key.toAttribute() for key in keys]
    return catalyst.questions("Aggregates").aggregate(catalyst.seq(columns), catalyst.seq([*columns, *made]), below)


def _can_group(column: Expression) -> bool:
    name = str(column.dataType().simpleString())
    return name in _GROUPED_TYPES or name.startswith("decimal(")


def _over_input(expression: Expression, stack: Stack, position: int, catalyst: Catalyst) -> Expression:
    """An expression right above node ``position + 1`` of the stack, over its input and its answers."""
    projects = [node for node in stack.nodes[position + 1 :] if node.nodeName() == "Project"]
    return catalyst.questions("Moves").inlined(expression, catalyst.seq(projects))
