"""What filters say about the answers of calls, as conditions that tasks can evaluate (``spark_llm.condition``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from spark_llm.call import Condition
from spark_llm.condition import judge
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node


@dataclasses.dataclass(frozen=True)
class Conjunct:
    """One of a filter's conjuncts.

    expression: as it stands there. below: in terms of the node that it was asked for. condition: below, translated,
    None: it cannot be. answers: numbers of the answers in it. is_cheap: it needs no answer, and no other column than
    that node has.
    """

    expression: Expression
    below: Expression
    condition: Condition | None
    answers: frozenset[int]
    is_cheap: bool


def conjuncts(filter_node: Node, bottom: Node, answers: Sequence[Expression], catalyst: Catalyst) -> list[Conjunct]:
    """The conjuncts of a Filter's condition, in terms of ``bottom``, a node below it with but one child each between.

    answers: what stands for answers in those terms; conditions have their numbers.
    """
    return condition_conjuncts(filter_node.condition(), filter_node.child(), bottom, answers, catalyst)


def condition_conjuncts(
    condition: Expression, top: Node, bottom: Node, answers: Sequence[Expression], catalyst: Catalyst
) -> list[Conjunct]:
    """The same of a condition over the output of ``top``."""
    found = catalyst.questions("Conditions").conjuncts(condition, top, bottom, catalyst.seq(answers))
    return [
        Conjunct(
            expression=row[0],
            below=row[1],
            condition=None if row[2] is None else json.loads(row[2]),
            answers=frozenset(map(int, row[3].split())),
            is_cheap=bool(row[4]),
        )
        for row in found
    ]


def below(expression: Expression, top: Node, bottom: Node, catalyst: Catalyst) -> Expression:
    """An expression over ``top``'s output in terms of ``bottom``, a node below it with but one child each between."""
    return catalyst.questions("Conditions").below(expression, top, bottom)


def renumbered(condition: Condition, numbers: Sequence[int]) -> Condition:
    """The condition with answer ``numbers[i]`` called i."""
    kind, *rest = condition
    if kind == "answer":
        return ["answer", numbers.index(rest[0])]
    if kind in ("literal", "in"):
        return [kind, *([renumbered(rest[0], numbers), rest[1]] if kind == "in" else rest)]
    return [kind, *(renumbered(part, numbers) if isinstance(part, list) else part for part in rest)]


def needs_all(conditions: Sequence[Condition], answers: int) -> bool:
    """Can a row meet the conditions only if it has all of so many answers, whatever the others are?

    A task that stops at a limit leaves rows without some of their answers: none of these may pass the filter.
    """
    nothing = [None] * answers
    return all(
        judge(conditions, nothing, [other == missing for other in range(answers)]) is False
        for missing in range(answers)
    )
