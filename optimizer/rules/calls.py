"""The calls of a plan as the rules see them: what a call asks about, and how its spec is changed in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from spark_llm.call import CallSpec
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Jvm, Node, items


@dataclasses.dataclass(frozen=True)
class Call:
    """One llm() call: ``node`` is the ArrowEvalPython that evaluates it, ``udf`` its PythonUDF there."""

    node: Node
    udf: Expression
    spec: CallSpec
    prompt: Expression
    fields: tuple[Expression, ...]

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
        return self.prompt_text[:60] or "(a prompt for each row)"

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


def calls_of(node: Node) -> list[Call]:
    """The calls that ``node``, an ArrowEvalPython of llm() calls, evaluates."""
    found = []
    for udf in items(node.udfs()):
        spec, prompt, *fields = items(udf.children())
        found.append(Call(node, udf, CallSpec.decode(str(spec.value().toString())), prompt, tuple(fields)))
    return found


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


def change_specs(
    plan: Node, catalyst: Catalyst, change: Callable[[Call], CallSpec], function: Callable[[CallSpec], Jvm | None]
) -> Node:
    """``plan`` with new specs. function(spec): the Python function of a call whose spec changed, None: the old one."""

    def with_specs(node: Node) -> Node:
        calls = calls_of(node)
        specs = [change(call) for call in calls]
        if all(spec == call.spec for spec, call in zip(specs, calls, strict=True)):
            return node
        udfs = [
            with_spec(call, spec, catalyst, function(spec)) if spec != call.spec else call.udf
            for call, spec in zip(calls, specs, strict=True)
        ]
        return catalyst.plans.ArrowEvalPython(catalyst.seq(udfs), node.resultAttrs(), node.child(), node.evalType())

    return rewrite(plan, catalyst, with_specs)


def with_spec(call: Call, spec: CallSpec, catalyst: Catalyst, function: Jvm | None = None) -> Expression:
    """The call's PythonUDF with another spec, and with another Python function if one is given."""
    udf = call.udf
    return catalyst.expressions.PythonUDF(
        udf.name(),
        function if function is not None else udf.func(),
        udf.dataType(),
        catalyst.seq([catalyst.literal(spec.encode()), call.prompt, *call.fields]),
        udf.evalType(),
        udf.udfDeterministic(),
        udf.resultId(),
    )


def no_function(spec: CallSpec) -> None:
    """For rules whose specs name no other order tables than before."""
