"""Joins on a call, other than inner ones, built from pairs of rows: above the join of what is cheap each pair is judged
once, and a number for each row finds what belongs to it again. Each side is read once, along one path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items, module

Judge = Callable[[Expression], Expression]
"""A BOOLEAN expression -> the same, with the calls in it made only where their values are needed."""


def join_of_pairs(
    join: Node, cheap: Expression | None, dear: Expression, judge: Judge, catalyst: Catalyst
) -> Node | None:
    """A plan that stands for ``join``; None for a kind of join that is not known.

    cheap: the part of the join's condition without calls over both sides, None: there is none; dear: the other part.
    """
    pairs = _Pairs(join, cheap, dear, judge, catalyst)
    kind = str(join.joinType().toString())
    if kind in ("LeftOuter", "RightOuter"):
        return pairs.outer()
    if kind == "FullOuter":
        return pairs.full()
    if kind == "LeftSemi":
        return pairs.semi()
    if kind == "LeftAnti":
        return pairs.anti()
    return pairs.existence() if kind.startswith("ExistenceJoin") else None


class _Pairs:
    def __init__(
        self, join: Node, cheap: Expression | None, dear: Expression, judge: Judge, catalyst: Catalyst
    ) -> None:
        self._join, self._cheap, self._dear, self._judge, self._catalyst = join, cheap, dear, judge, catalyst
        self._make = catalyst.expressions
        self._types = catalyst.jvm.org.apache.spark.sql.catalyst.plans

    # One method for each kind of join

    def outer(self) -> Node:
        """A kept row comes out with each partner, or once with NULLs: of its pairs the first one is an ok pair if there
        is any, so that all that are ok or first are what is needed."""
        join = self._join
        keeps_left = str(join.joinType().toString()) == "LeftOuter"
        kept, other = (join.left(), join.right()) if keeps_left else (join.right(), join.left())
        row = self._row_id()
        with_id = self._project([*items(kept.output()), row], kept)
        old = items(other.output())
        aliases = [self._renamed(column) for column in old]
        there = self._catalyst.named(self._boolean(True), "is_there")
        marked = self._project([*aliases, there], other)
        new = [self._nullable(alias) for alias in aliases]
        sides = (with_id, marked) if keeps_left else (marked, with_id)
        paired = self._joined(*sides, join.joinType(), self._with(self._cheap, old, new))
        ok = self._ok(self._make.IsNotNull(self._nullable(there)), self._with(self._dear, old, new))
        judged = self._project([*items(kept.output()), *new, row.toAttribute(), ok], paired)
        is_ok = ok.toAttribute()
        numbered, number = self._numbered(judged, row.toAttribute(), [self._falling(is_ok)])
        found = self._filter(self._make.Or(is_ok, self._is_one(number)), numbered)
        restored = dict(
            zip(map(_id, old), (self._only_if(is_ok, *both) for both in zip(new, old, strict=True)), strict=True)
        )
        return self._project([restored.get(_id(column), column) for column in items(join.output())], found)

    def semi(self) -> Node:
        left = self._join.left()
        row = self._row_id()
        with_id = self._project([*items(left.output()), row], left)
        paired = self._joined(with_id, self._join.right(), self._inner(), self._cheap)
        matched = self._filter(self._dear, paired)
        key = row.toAttribute()
        numbered, number = self._numbered(self._project([*items(left.output()), key], matched), key, [])
        return self._project(items(left.output()), self._filter(self._is_one(number), numbered))

    def anti(self) -> Node:
        best, ok = self._best_of_left()
        return self._project(items(self._join.left().output()), self._filter(self._make.Not(ok), best))

    def existence(self) -> Node:
        best, ok = self._best_of_left()
        exists = self._join.joinType().exists()
        return self._project([*items(self._join.left().output()), self._alias(ok, exists)], best)

    def _best_of_left(self) -> tuple[Node, Expression]:
        """Each left row once, and whether it is in an ok pair."""
        left, right = self._join.left(), self._join.right()
        row, there = self._row_id(), self._catalyst.named(self._boolean(True), "is_there")
        with_id = self._project([*items(left.output()), row], left)
        old = items(right.output())
        marked = self._project([*old, there], right)
        new = [column.withNullability(True) for column in old]
        paired = self._joined(with_id, marked, module(self._types, "LeftOuter"), self._cheap)
        ok = self._ok(self._make.IsNotNull(self._nullable(there)), self._with(self._dear, old, new))
        judged = self._project([*items(left.output()), row.toAttribute(), ok], paired)
        is_ok = ok.toAttribute()
        numbered, number = self._numbered(judged, row.toAttribute(), [self._falling(is_ok)])
        return self._filter(self._is_one(number), numbered), is_ok

    def full(self) -> Node:
        """A pair that is not ok may stand for two rows of the result: a left row and a right row without a partner."""
        make, join = self._make, self._join
        old, new, ids, sides = [], [], [], []
        for side in (join.left(), join.right()):
            row = self._row_id()
            aliases = [self._renamed(column) for column in items(side.output())]
            sides.append(self._project([*aliases, row], side))
            old.append(items(side.output()))
            new.append([self._nullable(alias) for alias in aliases])
            ids.append(self._nullable(row))
        flat_old, flat_new = old[0] + old[1], new[0] + new[1]
        paired = self._joined(sides[0], sides[1], join.joinType(), self._with(self._cheap, flat_old, flat_new))
        are_both = make.And(make.IsNotNull(ids[0]), make.IsNotNull(ids[1]))
        ok = self._ok(are_both, self._with(self._dear, flat_old, flat_new))
        is_ok = ok.toAttribute()
        # Rows of the other side without a partner have no id here: each is a group of its own, a negative one.
        keys = [
            self._catalyst.named(
                make.Coalesce(self._catalyst.seq([ids[i], make.BitwiseNot(ids[1 - i])])), f"{name}_key"
            )
            for i, name in enumerate(("left", "right"))
        ]
        plan = self._project([*flat_new, *ids, *keys, ok], paired)
        choices = [self._if(is_ok, self._catalyst.number(0), None)]
        for i in range(2):
            plan, number = self._numbered(plan, keys[i].toAttribute(), [self._falling(is_ok)])
            is_alone = make.And(make.Not(is_ok), make.And(make.IsNotNull(ids[i]), self._is_one(number)))
            choices.append(self._if(is_alone, self._catalyst.number(i + 1), None))
        which = self._catalyst.named(self._catalyst.number(0), "which").toAttribute().withNullability(True)
        seq, none = self._catalyst.seq, self._catalyst.none
        array = make.Explode(make.CreateArray(seq(choices)))
        exploded = self._catalyst.plans.Generate(array, seq([]), False, none, seq([which]), plan)
        found = self._filter(make.IsNotNull(which), exploded)
        columns = []
        for i in range(2):
            is_absent = make.EqualTo(which, self._catalyst.number(2 - i))
            columns += [self._only_if(make.Not(is_absent), *both) for both in zip(new[i], old[i], strict=True)]
        return self._project(columns, found)

    # What they are made of

    def _ok(self, is_pair: Expression, dear: Expression) -> Expression:
        """``is_pair AND dear`` as a column that is never NULL."""
        condition = self._make.And(is_pair, dear)
        judged = self._judge(self._make.If(condition, self._boolean(True), self._boolean(False)))
        return self._catalyst.named(judged, "is_ok")

    def _row_id(self) -> Expression:
        return self._catalyst.named(self._make.MonotonicallyIncreasingID(), "row_id")

    def _numbered(self, plan: Node, key: Expression, order: list[Expression]) -> tuple[Node, Expression]:
        """Rows of a key numbered from 1; returns the number, too."""
        make, catalyst = self._make, self._catalyst
        row_frame = module(make, "RowFrame")
        frame = make.SpecifiedWindowFrame(row_frame, module(make, "UnboundedPreceding"), module(make, "CurrentRow"))
        orders = catalyst.seq(order or [catalyst.ascending(key)])
        keys = catalyst.seq([key])
        window = make.WindowExpression(make.RowNumber(), make.WindowSpecDefinition(keys, orders, frame))
        number = catalyst.named(window, "pair_number")
        return catalyst.plans.Window(catalyst.seq([number]), keys, orders, plan, catalyst.none), number.toAttribute()

    def _falling(self, expression: Expression) -> Expression:
        falling = module(self._make, "Descending")
        return self._make.SortOrder(expression, falling, falling.defaultNullOrdering(), self._catalyst.seq([]))

    def _is_one(self, number: Expression) -> Expression:
        return self._make.EqualTo(number, self._catalyst.number(1))

    def _only_if(self, condition: Expression, value: Expression, name: Expression) -> Expression:
        """The value as the column ``name``, NULL where the condition does not hold."""
        return self._alias(self._if(condition, value, None), name)

    def _if(self, condition: Expression, value: Expression, other: object) -> Expression:
        return self._make.If(condition, value, self._make.Literal.create(other, value.dataType()))

    def _alias(self, expression: Expression, name: Expression) -> Expression:
        """The expression as the very column ``name``."""
        metadata = self._catalyst.some(name.metadata())
        return self._make.Alias(
            expression, name.name(), name.exprId(), name.qualifier(), metadata, self._catalyst.seq([])
        )

    def _renamed(self, column: Expression) -> Expression:
        # Under another name, for Spark takes away aliases that change nothing.
        return self._catalyst.named(column, f"{column.name()} of a pair")

    def _nullable(self, alias: Expression) -> Expression:
        return alias.toAttribute().withNullability(True)

    def _with(self, expression: Expression | None, old: list[Expression], new: list[Expression]) -> Expression | None:
        return None if expression is None else self._catalyst.questions("Pairs").renamed(expression, old, new)

    def _joined(self, left: Node, right: Node, kind: object, condition: Expression | None) -> Node:
        on = self._catalyst.none if condition is None else self._catalyst.some(condition)
        return self._catalyst.plans.Join(left, right, kind, on, self._join.hint())

    def _inner(self) -> object:
        return module(self._types, "Inner")

    def _project(self, columns: Iterable[Expression], child: Node) -> Node:
        return self._catalyst.plans.Project(self._catalyst.seq(columns), child)

    def _filter(self, condition: Expression, child: Node) -> Node:
        return self._catalyst.plans.Filter(condition, child)

    def _boolean(self, value: bool) -> Expression:
        return self._make.Literal.create(value, self._catalyst.types.BooleanType)


def _id(column: Expression) -> int:
    return int(column.exprId().id())
