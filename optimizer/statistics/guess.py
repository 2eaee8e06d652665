"""Rules of thumb where nothing is counted: dimensions before facts, text before numbers, else as written."""

from __future__ import annotations

from collections.abc import Sequence

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Node, items
from spark_llm.optimizer.statistics.values import ColumnCounts

_GROUPED = 16  # about by how much a GROUP BY below a join shrinks its side
_LAST = 1 << 30
_RANKS = {"StringType": 0, "ArrayType": 0, "StructType": 0, "MapType": 0, "BooleanType": 1, "DateType": 2}
_NUMBER = 3


def order_tables(plan: Node, sizes: Sequence[int], catalyst: Catalyst) -> list[int]:
    """A rank for each of the plan's tables: the one whose rows repeat most in the joined rows has 0.

    A row of the smaller side of a join is repeated; a GROUP BY below a join makes its side small and its keys unique.
    Where sizes are not known, the table joined last is the dimension (``facts JOIN dimension``).
    """
    grouped = _grouped(plan, catalyst)
    weights = [size // (_GROUPED if is_grouped else 1) for size, is_grouped in zip(sizes, grouped, strict=True)]
    order = sorted(range(len(weights)), key=lambda table: (weights[table], -table))
    return [order.index(table) for table in range(len(weights))]


def thumb_order(arguments: Sequence[Expression], columns: Sequence[ColumnCounts]) -> list[int]:
    """An order of the arguments: by the rank of their table (``ColumnCounts.table``), then texts before truth values,
    dates and numbers, then as written."""

    def key(number: int) -> tuple[int, int, int]:
        table = columns[number].table
        return _LAST if table is None else table, _type_rank(arguments[number]), number

    return sorted(range(len(arguments)), key=key)


def _grouped(plan: Node, catalyst: Catalyst) -> list[bool]:
    """For each leaf, left to right, whether a GROUP BY stands above it."""
    children = items(plan.children())
    if not children:
        return [False]
    below = [is_grouped for child in children for is_grouped in _grouped(child, catalyst)]
    return [True] * len(below) if plan.nodeName() in ("Aggregate", "Distinct") else below


def _type_rank(argument: Expression) -> int:
    """By the type of the column that an argument's text is made of."""
    columns = items(argument.references().toSeq())
    types = [str(column.dataType().getClass().getSimpleName()).removesuffix("$") for column in columns]
    return max((_RANKS.get(name, _NUMBER) for name in types), default=_NUMBER)
