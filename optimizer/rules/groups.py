"""Several calls in one node of the plan, and the stacks of nodes in which calls can be put together.

before                                      after
------                                      -----
ArrowEvalPython [llm(.., 'q', t)], [b]      Project [t, g.a0 AS a, g.a1 AS b]
+- ArrowEvalPython [llm(.., 'p', t)], [a]   +- ArrowEvalPython [llm_group({calls: p, q}, 'p', t, 'q')], [g]
   +- Relation [t]                             +- Relation [t]

The columns of the answers keep their ids, so nothing above notices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence

from spark_llm.call import Condition, GroupSpec
from spark_llm.optimizer.catalyst.bridge import GROUP_NAME, Catalyst, Expression, Node, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, calls_of, function_for, joint_columns
from spark_llm.optimizer.rules.conditions import below

MOST_CALLS = 16  # of a group: each has a stream of its own in every task


@dataclasses.dataclass(frozen=True)
class Answered:
    """A call that is to be put into a group, and the column that its answer is in. arguments: in terms of the node
    that the group is to stand on."""

    call: Call
    column: Expression
    arguments: tuple[Expression, ...]


def single_call(node: Node, context: Context) -> Call | None:
    """The call of a node that evaluates one call, no group, whose answers are repeatable; None for other nodes, and for
    embeddings: these have an engine of their own, their prompts share nothing, and no task judges vectors."""
    call = repeatable_call(node, context)
    return None if call is None or call.spec.task == "embed" else call


def repeatable_call(node: Node, context: Context) -> Call | None:
    """The call of a node that evaluates one call, no group, whose answers are repeatable; None for other nodes."""
    if not context.catalyst.is_call(node) or node.udfs().size() != 1:
        return None
    call = calls_of(node)[0]
    return call if call.group is None and call.spec.is_repeatable and bool(call.udf.deterministic()) else None


def group_node(
    members: Sequence[Answered],
    child: Node,
    context: Context,
    conditions: Sequence[Condition] = (),
    limit: int = 0,
    pair: Expression | None = None,
) -> Node:
    """``child`` with the members' columns, answered by one UDF. A limit makes the group one of its own in the query.

    pair: the id of a pair's left row, of whose pairs one match is enough (``GroupSpec.pair``).
    """
    catalyst = context.catalyst
    specs = [member.call.spec for member in members]
    columns, numbers = joint_columns([member.arguments for member in members], catalyst)
    udf = context.group({}, len(specs))
    function = function_for(specs, True, context)
    nothing = catalyst.expressions.Literal.create(None, udf.dataType())
    result = catalyst.named(nothing, GROUP_NAME)
    identity, column = result.exprId(), result.toAttribute()
    group = GroupSpec(
        calls=tuple(specs),
        arguments=numbers,
        conditions=tuple(conditions),
        limit=limit,
        # Planned once, so unique: two nodes of a query must not count each other's rows.
        node=f"{identity.id()}" if limit else "",
        pair=None if pair is None else len(columns),
    )
    made = catalyst.expressions.PythonUDF(
        GROUP_NAME,
        udf.func() if function is None else function,
        udf.dataType(),
        catalyst.seq([catalyst.literal(group.encode()), *columns, *([] if pair is None else [pair])]),
        udf.pythonEvalType(),
        True,
        identity,
    )
    node = catalyst.plans.ArrowEvalPython(catalyst.seq([made]), catalyst.seq([column]), child, udf.pythonEvalType())
    answers = [_member(column, number, member.column, context) for number, member in enumerate(members)]
    return catalyst.plans.Project(catalyst.seq([*items(child.output()), *answers]), node)


def _member(column: Expression, number: int, old: Expression, context: Context) -> Expression:
    """``column.a<number>`` under the name and the id of the column ``old``."""
    catalyst = context.catalyst
    field = catalyst.expressions.GetStructField(column, number, catalyst.none)
    return catalyst.expressions.Alias(
        field, old.name(), old.exprId(), catalyst.seq([]), catalyst.none, catalyst.seq([])
    )


def rewrite_stacks(
    plan: Node, context: Context, between: Container[str], change: Callable[[list[Node], Context], Node | None]
) -> Node:
    """``plan`` with ``change`` made to each stack of calls and what stands ``between`` them, until it gives None.

    between: names of nodes; none that does something at random is part of a stack. change gets nodes from the top down.
    """
    catalyst = context.catalyst
    if plan.isStreaming() or not catalyst.holds_call(plan):
        return plan
    nodes, bottom = _stack(plan, between, catalyst)
    children = items(bottom.children())
    changed = [rewrite_stacks(child, context, between, change) for child in children]
    if any(new is not old for new, old in zip(changed, children, strict=True)):
        bottom = catalyst.with_children(bottom, changed)
        for number in range(len(nodes) - 1, -1, -1):
            bottom = nodes[number] = catalyst.with_children(nodes[number], [bottom])
    top = nodes[0] if nodes else bottom
    while nodes and (new := change(nodes, context)) is not None:
        top = new
        nodes, _ = _stack(top, between, catalyst)
    return top


def _stack(node: Node, between: Container[str], catalyst: Catalyst) -> tuple[list[Node], Node]:
    """The stack that begins with ``node``, and the first node below it."""
    nodes = []
    while (node.nodeName() in between or catalyst.is_call(node)) and catalyst.is_deterministic(node):
        nodes.append(node)
        node = node.child()
    return nodes, node


def restacked(
    nodes: Sequence[Node],
    replaced: Mapping[int, Callable[[Node], Node] | None],
    columns: Mapping[int, Expression],
    context: Context,
) -> Node:
    """A stack, ``nodes`` from the top down, built anew from the bottom up over what its last node stands on.

    replaced: by number in ``nodes`` what is made of a node, given the node below; None: nothing, it is left out.
    columns: by number the column of a node that now comes from further below; projections between hand it on.
    """
    catalyst = context.catalyst
    node = nodes[-1].child()
    for number in reversed(range(len(nodes))):
        old = nodes[number]
        if number in replaced:
            make = replaced[number]
            node = node if make is None else make(node)
        elif old.nodeName() == "Project":
            there = {attribute.exprId().id() for attribute in items(node.output())}
            missing = [column for place, column in columns.items() if place < number and column.exprId().id() in there]
            node = catalyst.plans.Project(catalyst.seq([*items(old.projectList()), *missing]), node)
        else:
            node = catalyst.with_children(old, [node])
    if not node.output().equals(nodes[0].output()):
        node = catalyst.plans.Project(nodes[0].output(), node)
    return node


def upon(bottom: Node, call: Call, node: Node, made: Node, context: Context) -> Call | None:
    """The call of ``node`` in terms of ``bottom``, a node below; None where ``made`` has not what it asks about.

    made: ``bottom``, or that with answers which the call may need.
    """
    catalyst = context.catalyst
    arguments = [below(each, node.child(), bottom, catalyst) for each in call.arguments]
    if not all(catalyst.has_input(each, made) for each in arguments):
        return None
    mask = arguments.pop() if call.mask is not None else None
    prompt, *fields = arguments
    return dataclasses.replace(call, prompt=prompt, fields=tuple(fields), mask=mask)
