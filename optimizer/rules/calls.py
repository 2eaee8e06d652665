"""The calls of a plan as the rules see them: what a call asks about, and how its spec is changed in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import msgspec

from spark_llm.call import CallSpec, GroupSpec
from spark_llm.optimizer.catalyst.bridge import GROUP_NAME, Catalyst, Expression, Jvm, Node, items
from spark_llm.optimizer.catalyst.context import Context


@dataclasses.dataclass(frozen=True)
class Call:
    """One llm() call: ``node`` is the ArrowEvalPython that evaluates it, ``udf`` its PythonUDF there.

    mask: the BOOLEAN that says which rows are asked, None: all. group: of the call where it shares its UDF with others,
    then ``member`` is its number there. pair: the id of the left row whose pair a row is (``GroupSpec.pair``).
    """

    node: Node
    udf: Expression
    spec: CallSpec
    prompt: Expression
    fields: tuple[Expression, ...]
    mask: Expression | None = None
    group: GroupSpec | None = None
    member: int = 0
    pair: Expression | None = None

    @property
    def arguments(self) -> tuple[Expression, ...]:
        """The call's columns as a UDF has them: prompt, fields, mask."""
        return (self.prompt, *self.fields, *(() if self.mask is None else (self.mask,)))

    @property
    def has_constant_prompt(self) -> bool:
        return bool(self.prompt.foldable())

    @property
    def prompt_text(self) -> str:
        """The prompt where it is a constant."""
        return str(self.prompt.value()) if self.prompt.nodeName() == "Literal" else ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.spec.fields)

    @property
    def label(self) -> str:
        """What the call is called in messages: its prompt, shortened."""
        return label_of(self.prompt_text)

    def has_fields_of(self, other: Call, catalyst: Catalyst) -> bool:
        """Do both ask about the same fields, by value and name, in any order?"""
        mine, theirs = (
            sorted(
                (
                    (name, catalyst.traced(field, call.node))
                    for name, field in zip(call.names, call.fields, strict=True)
                ),
                key=lambda pair: pair[0],
            )
            for call in (self, other)
        )
        return len(mine) == len(theirs) and all(
            name == other_name and field.semanticEquals(other_field)
            for (name, field), (other_name, other_field) in zip(mine, theirs, strict=True)
        )


def label_of(prompt: str) -> str:
    """What a call is called in messages: its prompt, shortened; "" is one that differs from row to row."""
    return prompt[:60] or "(a prompt for each row)"


def calls_of(node: Node) -> list[Call]:
    """The calls that ``node``, an ArrowEvalPython of llm() calls, evaluates; members of a group one after the other."""
    found = []
    for udf in items(node.udfs()):
        text, *columns = items(udf.children())
        if udf.name() != GROUP_NAME:
            found.append(_call(node, udf, CallSpec.decode(literal_text(text)), columns))
            continue
        group = GroupSpec.decode(literal_text(text))
        pair = None if group.pair is None else columns[group.pair]
        for member, (spec, numbers) in enumerate(zip(group.calls, group.arguments, strict=True)):
            call = _call(node, udf, spec, [columns[number] for number in numbers])
            found.append(dataclasses.replace(call, group=group, member=member, pair=pair))
    return found


def _call(node: Node, udf: Expression, spec: CallSpec, columns: list[Expression]) -> Call:
    prompt, *fields = columns
    mask = fields.pop() if spec.masked else None
    return Call(node, udf, spec, prompt, tuple(fields), mask)


def literal_text(literal: Expression) -> str:
    """The value of a STRING literal."""
    return str(literal.value().toString())


def all_calls(plan: Node, catalyst: Catalyst) -> Iterator[Call]:
    """All calls of a plan, those that are evaluated first first."""
    if not catalyst.holds_call(plan):
        return
    for child in items(plan.children()):
        yield from all_calls(child, catalyst)
    if catalyst.is_call(plan):
        yield from calls_of(plan)


def decided_calls(plan: Node, catalyst: Catalyst) -> list[Call]:
    """Calls that the prompt rules have seen before this plan: those of its subqueries, which Spark optimizes first."""
    found = [call for call in all_calls(plan, catalyst) if call.spec.prompt is not None]
    for subquery in items(plan.subqueriesAll()):
        found += [call for call in all_calls(subquery, catalyst) if call.spec.prompt is not None]
    return found


def rewrite(plan: Node, catalyst: Catalyst, change: Callable[[Node], Node]) -> Node:
    """``plan`` with ``change`` made to each node that evaluates calls, children first."""
    if not catalyst.holds_call(plan):
        return plan
    children = items(plan.children())
    changed = [rewrite(child, catalyst, change) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        plan = catalyst.with_children(plan, changed)
    return change(plan) if catalyst.is_call(plan) else plan


def rewrite_below(
    plan: Node,
    catalyst: Catalyst,
    see: Callable[[Node, bool], bool],
    change: Callable[[Node, bool], Node],
    seen: bool,
) -> Node:
    """As ``rewrite``, where ``change`` is also told what ``see`` made of the nodes from the root down to the call."""
    if not catalyst.holds_call(plan):
        return plan
    seen = see(plan, seen)
    children = items(plan.children())
    changed = [rewrite_below(child, catalyst, see, change, seen) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        plan = catalyst.with_children(plan, changed)
    return change(plan, seen) if catalyst.is_call(plan) else plan


Function = Callable[[Sequence[CallSpec], bool], Jvm | None]
"""(specs, is_group) -> the Python function of a UDF whose calls now have these specs; None: the one that it has."""


def function_for(specs: Sequence[CallSpec], is_group: bool, context: Context) -> Jvm | None:
    """The Python function with the order tables that the specs name; None where they name none."""
    digests = {spec.prompt.table for spec in specs if spec.prompt is not None and spec.prompt.table is not None}
    if not digests:
        return None
    tables = {digest: context.tables[digest] for digest in digests}
    return context.group(tables, len(specs)).func() if is_group else context.function(tables)


def change_specs(plan: Node, catalyst: Catalyst, change: Callable[[Call], CallSpec], function: Function) -> Node:
    """``plan`` with new specs, and where a spec changed with the UDF's new function."""

    def with_specs(node: Node) -> Node:
        calls = calls_of(node)
        specs = [change(call) for call in calls]
        if all(spec == call.spec for spec, call in zip(specs, calls, strict=True)):
            return node
        changed = [dataclasses.replace(call, spec=spec) for call, spec in zip(calls, specs, strict=True)]
        return rebuilt(node, changed, catalyst, function=function)

    return rewrite(plan, catalyst, with_specs)


def rebuilt(
    node: Node,
    calls: Sequence[Call],
    catalyst: Catalyst,
    child: Node | None = None,
    function: Function | None = None,
) -> Node:
    """``node``, an ArrowEvalPython, made anew of its ``calls`` (as of ``calls_of``, with other specs or columns)
    over ``child`` (None: the old one). Its result attributes stay as they are."""
    udfs = []
    rest = list(calls)
    while rest:
        count = 1 if rest[0].group is None else len(rest[0].group.calls)
        members, rest = rest[:count], rest[count:]
        udfs.append(_udf(members, catalyst, function))
    below = node.child() if child is None else child
    return catalyst.plans.ArrowEvalPython(catalyst.seq(udfs), node.resultAttrs(), below, node.evalType())


def _udf(members: list[Call], catalyst: Catalyst, function: Function | None) -> Expression:
    first = members[0]
    specs = [call.spec for call in members]
    made = None if function is None or _specs(first.udf) == specs else function(specs, first.group is not None)
    if first.group is None:
        children = [catalyst.literal(first.spec.encode()), *first.arguments]
    else:
        columns, numbers = joint_columns([call.arguments for call in members], catalyst)
        group = msgspec.structs.replace(first.group, calls=tuple(specs), arguments=numbers)
        if first.pair is not None:
            group = msgspec.structs.replace(group, pair=len(columns))
            columns.append(first.pair)
        children = [catalyst.literal(group.encode()), *columns]
    udf = first.udf
    return catalyst.expressions.PythonUDF(
        udf.name(),
        made if made is not None else udf.func(),
        udf.dataType(),
        catalyst.seq(children),
        udf.evalType(),
        udf.udfDeterministic(),
        udf.resultId(),
    )


def _specs(udf: Expression) -> list[CallSpec]:
    text = literal_text(udf.children().apply(0))
    return list(GroupSpec.decode(text).calls) if udf.name() == GROUP_NAME else [CallSpec.decode(text)]


def joint_columns(
    arguments: Sequence[Sequence[Expression]], catalyst: Catalyst
) -> tuple[list[Expression], tuple[tuple[int, ...], ...]]:
    """The columns of a group whose calls have these arguments, each once, and for each call the numbers of its own."""
    flat = [argument for own in arguments for argument in own]
    columns: list[Expression] = []
    numbers: list[int] = []
    places: dict[object, int] = {}
    for argument, number in zip(flat, catalyst.numbered(flat), strict=True):
        # Constants have no number: each stands for itself, but for equal texts.
        key: object = number if number >= 0 else argument.sql()
        if key not in places:
            places[key] = len(columns)
            columns.append(argument)
        numbers.append(places[key])
    rest = iter(numbers)
    return columns, tuple(tuple(next(rest) for _ in own) for own in arguments)


def no_function(specs: Sequence[CallSpec], is_group: bool) -> None:
    """For rules whose specs name no other order tables than before."""
