"""Aggregate functions in two steps: what can be made of rows before equal ones are joined, and what of the joined rows.

Only functions that come out exactly the same (counts, sums and averages of whole numbers, sums of decimals, minima,
maxima, and what looks at distinct values only).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items
from spark_llm.optimizer.catalyst.placing import references

COUNT_NAME = "_llm_n"
_WHOLE = {"tinyint", "smallint", "int", "bigint"}
_AVERAGED = {"tinyint", "smallint", "int"}  # their sums are exact as DOUBLE, which avg() adds up
_MOST_DIGITS = 38
_DIGITS_OF_SUM = 10  # that the sum of decimals has more than they
_REPEATS_ARE_NOTHING = {"Max", "Min", "BitAndAgg", "BitOrAgg", "HyperLogLogPlusPlus"}

Inline = Callable[[Expression], Expression]


@dataclasses.dataclass
class Partials:
    """olds, news: functions of the upper aggregate, and what stands for each over the joined rows. made: what is to be
    made for that of the rows that are joined, as columns: ``COUNT_NAME`` is how many there are."""

    catalyst: Catalyst
    olds: list[Expression] = dataclasses.field(default_factory=list)
    news: list[Expression] = dataclasses.field(default_factory=list)
    made: list[Expression] = dataclasses.field(default_factory=list)
    _count: Expression | None = None

    def count(self) -> Expression:
        """The column that says how many rows were joined."""
        if self._count is None:
            function = self.catalyst.questions("Aggregates").count(self.catalyst.number(1), None)
            self._count = self.make(function, COUNT_NAME)
        return self._count

    def make(self, function: Expression, name: str = "") -> Expression:
        """A column of what ``function`` makes of the rows that are joined."""
        alias = self.catalyst.named(function, name or f"_llm_p{len(self.made)}")
        self.made.append(alias)
        return alias.toAttribute()


def take_apart(aggregate: Node, inline: Inline, answers: set[int], catalyst: Catalyst) -> Partials | str:
    """The functions of an Aggregate in two steps; or which one cannot be taken apart, in words.

    inline: an expression below the aggregate, over the rows that are joined and the answers of calls. answers: ids of
    these; what needs one can only be made of the joined rows.
    """
    found = Partials(catalyst)
    for function in items(catalyst.questions("Aggregates").functions(aggregate)):
        new = _in_two_steps(function, inline, answers, found)
        if new is None:
            return f"{function.aggregateFunction().prettyName()!s}() may come out otherwise over distinct inputs"
        if new is not function:
            found.olds.append(function)
            found.news.append(new)
    return found


def _in_two_steps(function: Expression, inline: Inline, answers: set[int], found: Partials) -> Expression | None:
    """What stands for ``function`` above; itself where repeated rows are nothing to it; None: it cannot be done."""
    catalyst = found.catalyst
    ours = catalyst.questions("Aggregates")
    inner = function.aggregateFunction()
    name = str(inner.getClass().getSimpleName())
    arguments = items(inner.children())
    condition = function.filter().get() if function.filter().isDefined() else None
    below = [inline(argument) for argument in arguments]
    condition_below = None if condition is None else inline(condition)
    needed = [*below, *([] if condition_below is None else [condition_below])]
    is_early = not references(needed, catalyst) & answers
    types = [str(argument.dataType().simpleString()) for argument in arguments]
    if function.isDistinct():
        return function if name == "Count" or (name in ("Sum", "Average") and types[0] in _WHOLE) else None
    if name in _REPEATS_ARE_NOTHING:
        if not is_early or name not in ("Max", "Min"):
            return function
        column = found.make(ours.over(function, catalyst.seq(below), condition_below))
        return ours.over(function, catalyst.seq([column]), None)
    if is_early and name in ("Count", "Sum") and not _counts_all(name, arguments, condition):
        if name == "Sum" and (types[0] not in _WHOLE and not _has_room(types[0])):
            return None
        column = found.make(ours.over(function, catalyst.seq(below), condition_below))
        if name == "Count":
            return ours.orZero(ours.sum(column, None))
        return ours.cast(ours.over(function, catalyst.seq([column]), None), inner.dataType())
    if name == "Count":
        values = [argument for argument in arguments if not _is_known(argument)]
        weight = ours.countIf(catalyst.seq(values), found.count()) if values else found.count()
        return ours.orZero(ours.sum(weight, condition))
    if name == "Sum" and types[0] in _WHOLE and not ours.isTry(function):
        return ours.sum(ours.times(arguments[0], found.count()), condition)
    if name == "Average" and types[0] in _AVERAGED and is_early:
        total = found.make(ours.sum(below[0], condition_below))
        known = found.make(ours.count(below[0], condition_below))
        return ours.quotient(ours.sum(total, None), ours.orZero(ours.sum(known, None)))
    if name == "Average" and types[0] in _AVERAGED:
        weight = ours.countIf(catalyst.seq(arguments), found.count())
        count = ours.orZero(ours.sum(weight, condition))
        return ours.quotient(ours.sum(ours.times(arguments[0], found.count()), condition), count)
    return None


def _counts_all(name: str, arguments: list[Expression], condition: Expression | None) -> bool:
    return name == "Count" and condition is None and all(_is_known(argument) for argument in arguments)


def _is_known(argument: Expression) -> bool:
    """Is it never NULL?"""
    return not argument.nullable()


def _has_room(type_name: str) -> bool:
    """Is a sum of sums of such decimals no wider than decimals may be?"""
    if not type_name.startswith("decimal("):
        return False
    digits = int(type_name.removeprefix("decimal(").split(",")[0])
    return digits + 2 * _DIGITS_OF_SUM <= _MOST_DIGITS
