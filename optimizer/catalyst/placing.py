"""Moving a call's node through a plan: past a join, up or down, with its filters and the columns that it needs.

Pure surgery: whether a move pays is the rules' affair. A move gives None where it would change the query's rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items

# Of which children a join keeps the rows as they are, but for dropping or repeating them.
_KEPT_SIDES = {
    "Inner": (0, 1),
    "Cross": (0, 1),
    "LeftOuter": (0,),
    "RightOuter": (1,),
    "LeftSemi": (0,),
    "LeftAnti": (0,),
}


class Moved(NamedTuple):
    """``plan`` stands for the one before the move; ``node`` is the call's node in it."""

    plan: Node
    node: Node


@dataclasses.dataclass(frozen=True)
class Chain:
    """What stands between a node and the first one below that is more than a Project or a Filter: ``bottom``.

    nodes: from the top down. projects: those of them that are Projects.
    """

    nodes: tuple[Node, ...]
    bottom: Node

    @property
    def projects(self) -> list[Node]:
        return [node for node in self.nodes if node.nodeName() == "Project"]

    def inlined(self, expression: Expression, catalyst: Catalyst) -> Expression:
        """An expression over the chain's output, over the output of ``bottom``."""
        return _moves(catalyst).inlined(expression, catalyst.seq(self.projects))

    def conditions(self, catalyst: Catalyst) -> list[Expression]:
        """The conditions of the chain's Filters over the output of ``bottom``, the lowest first."""
        found: list[Expression] = []
        below: list[Node] = []
        for node in reversed(self.nodes):
            if node.nodeName() == "Project":
                below.insert(0, node)
            else:
                found.append(_moves(catalyst).inlined(node.condition(), catalyst.seq(below)))
        return found


def chain(node: Node, catalyst: Catalyst) -> Chain:
    """The chain beginning with ``node``; a Project or Filter at random or with a correlated subquery is its bottom."""
    nodes = []
    while node.nodeName() in ("Project", "Filter") and _moves(catalyst).isPlain(node):
        nodes.append(node)
        node = node.child()
    return Chain(tuple(nodes), node)


def join_type(join: Node) -> str:
    return str(join.joinType().toString())


def kept_sides(join: Node) -> tuple[int, ...]:
    """The numbers of the children of whose rows the join makes no others: NULLs for a lost partner are others."""
    return _KEPT_SIDES.get(join_type(join), ())


def references(expressions: Iterable[Expression], catalyst: Catalyst) -> set[int]:
    """The ids of the columns that the expressions need."""
    return {int(identity) for identity in str(_moves(catalyst).references(catalyst.seq(expressions))).split()}


def output_ids(plan: Node, catalyst: Catalyst) -> list[int]:
    """The ids of the columns that the plan gives, in their order."""
    return [int(identity) for identity in str(_moves(catalyst).output(plan)).split()]


def is_plain(node: Node, catalyst: Catalyst) -> bool:
    """Are the node's own expressions deterministic, without Python functions and correlated subqueries?"""
    return bool(_moves(catalyst).isPlain(node))


def drops_rows(plan: Node, catalyst: Catalyst) -> bool:
    """Is there a Filter in the plan that is more than IS NOT NULL?"""
    return bool(_moves(catalyst).dropsRows(plan))


def is_unique(plan: Node, columns: Sequence[Expression], catalyst: Catalyst) -> bool:
    """Does the plan alone tell that no two of its rows have equal ``columns``?"""
    return bool(_moves(catalyst).isUnique(plan, catalyst.seq(columns)))


def column(value: Expression, like: Expression, catalyst: Catalyst) -> Expression:
    """``value`` as the column that the attribute ``like`` is, for a Project."""
    return _moves(catalyst).column(value, like)


def renamed(
    expression: Expression, olds: Sequence[Expression], news: Sequence[Expression], catalyst: Catalyst
) -> Expression:
    """The expression with ``news`` instead of the attributes ``olds``."""
    return _moves(catalyst).renamed(expression, catalyst.seq(olds), catalyst.seq(news)) if olds else expression


def project(entries: Sequence[Expression], child: Node, catalyst: Catalyst) -> Node:
    """A Project, or ``child`` itself where it gives just these columns, as qualified."""
    wanted = catalyst.seq(entries)
    return child if wanted.equals(child.output()) else catalyst.plans.Project(wanted, child)


def filtered(conditions: Iterable[Expression], child: Node, catalyst: Catalyst) -> Node:
    """``child`` below a Filter for each condition, the first one at the bottom."""
    for condition in conditions:
        child = catalyst.plans.Filter(condition, child)
    return child


def arguments_of(node: Node) -> list[Expression]:
    """The columns of all UDFs of an ArrowEvalPython of calls, without their specs."""
    return [argument for udf in items(node.udfs()) for argument in items(udf.children())[1:]]


def with_arguments(node: Node, arguments: Sequence[Expression], child: Node, catalyst: Catalyst) -> Node:
    """``node`` with other columns (as of ``arguments_of``) over another child."""
    rest = list(arguments)
    udfs = []
    for udf in items(node.udfs()):
        old = items(udf.children())
        own, rest = rest[: len(old) - 1], rest[len(old) - 1 :]
        udfs.append(catalyst.with_children(udf, [old[0], *own]))
    return catalyst.plans.ArrowEvalPython(catalyst.seq(udfs), node.resultAttrs(), child, node.evalType())


def pulled(join: Node, side: int, catalyst: Catalyst) -> Moved | None:
    """The join with the topmost call of its child ``side`` above it, with the filters on its answers.

    What the child's Projects make of the answers is made above, too; what they make of other columns stays below. None
    where there is no such call, or the join does not keep that side's rows, or compares its answers.
    """
    if side not in kept_sides(join):
        return None
    sides = items(join.children())
    between = chain(sides[side], catalyst)
    node = between.bottom
    if not catalyst.is_call(node):
        return None
    answers = set(_ids(items(node.resultAttrs())))
    others = output_ids(sides[1 - side], catalyst)
    if answers & set(others):
        return None
    entries = {
        int(attribute.exprId().id()): column(between.inlined(attribute, catalyst), attribute, catalyst)
        for attribute in items(sides[side].output())
    }
    late = {identity for identity, entry in entries.items() if references([entry], catalyst) & answers}
    condition = join.condition()
    if condition.isDefined() and references([condition.get()], catalyst) & late:
        return None
    conditions = between.conditions(catalyst)
    late_conditions = [each for each in conditions if references([each], catalyst) & answers]
    early_conditions = [each for each in conditions if not references([each], catalyst) & answers]

    # Columns that the call and what follows from it need, by ids that the join's other side does not have.
    arguments = arguments_of(node)
    needed = references([*arguments, *late_conditions, *(entries[i] for i in late)], catalyst) - answers
    early = [entry for identity, entry in entries.items() if identity not in late]
    given = {int(entry.exprId().id()) for entry in early if catalyst.is_attribute(entry)}
    made = set(entries) - given
    olds, news = [], []
    for attribute in items(node.child().output()):
        identity = int(attribute.exprId().id())
        if identity not in needed or identity in given:
            continue
        if identity in others or identity in made:
            alias = catalyst.named(attribute, str(attribute.name()))
            olds.append(attribute)
            news.append(alias.toAttribute())
            early.append(alias)
        else:
            early.append(attribute)
    below = project(early, filtered(early_conditions, node.child(), catalyst), catalyst)
    joined = catalyst.with_children(join, [below if i == side else child for i, child in enumerate(sides)])
    moved = with_arguments(node, [renamed(a, olds, news, catalyst) for a in arguments], joined, catalyst)
    above = filtered([renamed(each, olds, news, catalyst) for each in late_conditions], moved, catalyst)
    final = [
        renamed(entries[i], olds, news, catalyst) if (i := int(attribute.exprId().id())) in late else attribute
        for attribute in items(join.output())
    ]
    return Moved(project(final, above, catalyst), moved)


def pushed(node: Node, catalyst: Catalyst) -> list[Moved]:
    """The call's node below the next join, on the side that has all its columns; then below the next one there, ..."""
    between = chain(node.child(), catalyst)
    join = between.bottom
    if join.nodeName() != "Join" or not is_plain(join, catalyst):
        return []
    arguments = [between.inlined(argument, catalyst) for argument in arguments_of(node)]
    needed = references(arguments, catalyst)
    sides = items(join.children())
    side = next((i for i in kept_sides(join) if needed <= set(output_ids(sides[i], catalyst))), None)
    if side is None or not needed:
        return []
    results = items(node.resultAttrs())
    below = with_arguments(node, arguments, sides[side], catalyst)
    found = []
    for moved in [Moved(below, below), *pushed(below, catalyst)]:
        plan = catalyst.with_children(join, [moved.plan if i == side else child for i, child in enumerate(sides)])
        for above in reversed(between.nodes):
            if above.nodeName() == "Project":
                plan = catalyst.plans.Project(catalyst.seq([*items(above.projectList()), *results]), plan)
            else:
                plan = catalyst.with_children(above, [plan])
        found.append(Moved(project(items(node.output()), plan, catalyst), moved.node))
    return found


def _ids(attributes: Iterable[Expression]) -> list[int]:
    return [int(attribute.exprId().id()) for attribute in attributes]


def _moves(catalyst: Catalyst) -> Node:
    return catalyst.questions("Moves")
