"""Statistics that ``ANALYZE TABLE … COMPUTE STATISTICS FOR COLUMNS`` left in the catalog, read off a plan's tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Jvm, Node, items
from spark_llm.optimizer.statistics.plain import leaves
from spark_llm.optimizer.statistics.values import ColumnCounts

_SAME_ROWS = {"Project", "Repartition", "RepartitionByExpression", "ResolvedHint", "Sort", "SubqueryAlias"}
_BYTES_PER_TOKEN = 4.0  # English; digits are tokens of their own in many vocabularies


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """A leaf of the plan: its columns by expression id, its number, bytes, rows and column statistics where known."""

    number: int
    size: int
    names: dict[int, str]
    rows: int | None
    columns: Jvm | None


def catalog_statistics(
    plan: Node, arguments: list[Expression], labels: list[float], catalyst: Catalyst
) -> tuple[int | None, list[ColumnCounts]]:
    """Rows of the largest table below, and counts of each argument by the column that it is made of.

    labels: tokens of each rendered cell beside its value. What the catalog does not know is None, and so are the rows
    where anything between may drop or add some. The number of the table is always given, where an argument is made of
    columns of one.
    """
    tables = [_table(number, leaf) for number, leaf in enumerate(leaves(plan))]
    known = [table.rows for table in tables if table.rows is not None]
    rows = max(known) if len(known) == len(tables) and known and _keeps_rows(plan, catalyst) else None
    sources = _sources(plan, tables, catalyst)
    counts = [_counts(argument, label, sources, catalyst) for argument, label in zip(arguments, labels, strict=True)]
    return rows, counts


def _keeps_rows(plan: Node, catalyst: Catalyst) -> bool:
    """Are the rows of ``plan`` those of its largest table (as far as a join finds a partner for each)?"""
    name = str(plan.nodeName())
    children = items(plan.children())
    if children and name == "Filter":
        # Spark puts these below joins by itself.
        if not catalyst.only_drops_nulls(plan):
            return False
    elif children and name == "Join":
        if not catalyst.has_equality(plan):
            return False
    elif children and name not in _SAME_ROWS:
        return False
    return all(_keeps_rows(child, catalyst) for child in children)


def table_sizes(plan: Node) -> list[int]:
    """Bytes of each of the plan's tables, by number; those that do not know it have the largest number there is."""
    return [int(str(leaf.stats().sizeInBytes())) for leaf in leaves(plan)]


def _table(number: int, leaf: Node) -> _Table:
    names = {int(attribute.exprId().id()): str(attribute.name()) for attribute in items(leaf.output())}
    size = int(str(leaf.stats().sizeInBytes()))
    statistics = _catalog_entry(leaf)
    if statistics is None:
        return _Table(number, size, names, None, None)
    rows = int(str(statistics.rowCount().get())) if statistics.rowCount().isDefined() else None
    return _Table(number, size, names, rows, statistics.colStats())


def _catalog_entry(leaf: Node) -> Jvm | None:
    """The CatalogStatistics of a leaf, None if it is no table of a catalog or was never analysed."""
    name = str(leaf.nodeName())
    if name.startswith("LogicalRelation") or name == "Relation":
        table = leaf.catalogTable()
        entry = table.get() if table.isDefined() else None
    else:
        entry = leaf.tableMeta() if name == "HiveTableRelation" else None
    return entry.stats().get() if entry is not None and entry.stats().isDefined() else None


def _sources(plan: Node, tables: list[_Table], catalyst: Catalyst) -> dict[int, tuple[_Table, str]]:
    """Expression id -> the table's column that it is, followed through aliases that only rename.

    The two sides of a join's equality hold the same values: both count as the smaller table's column, on which that
    table's other columns depend.
    """
    found = {identity: (table, name) for table in tables for identity, name in table.names.items()}

    def follow(node: Node) -> None:
        for child in items(node.children()):
            follow(child)
        if node.nodeName() == "Join":
            for one, other in catalyst.equal_columns(node):
                if one in found and other in found:
                    found[one] = found[other] = min(found[one], found[other], key=lambda source: source[0].size)
        if node.nodeName() in ("Project", "Aggregate"):
            entries = node.projectList() if node.nodeName() == "Project" else node.aggregateExpressions()
            for entry in items(entries):
                if entry.nodeName() == "Alias":
                    sources = {found.get(int(a.exprId().id())) for a in _references(entry)}
                    if len(sources) == 1 and (source := sources.pop()) is not None:
                        found[int(entry.exprId().id())] = source

    follow(plan)
    return found


def _references(expression: Expression) -> list[Expression]:
    return items(expression.references().toSeq())


def _counts(
    argument: Expression, label: float, sources: dict[int, tuple[_Table, str]], catalyst: Catalyst
) -> ColumnCounts:
    found = {sources.get(int(attribute.exprId().id())) for attribute in _references(argument)}
    if len(found) != 1 or (source := found.pop()) is None:
        return ColumnCounts()
    table, name = source
    entry = table.columns.get(name) if table.columns is not None else None
    if entry is None or not entry.isDefined():
        return ColumnCounts(table=table.number)

    def value(read: Callable[[Jvm], Jvm]) -> float | None:
        option = read(entry.get())
        return float(str(option.get())) if option.isDefined() else None

    distinct, mean = value(lambda s: s.distinctCount()), value(lambda s: s.avgLen())
    return ColumnCounts(
        distinct=None if distinct is None else max(1, int(distinct)),
        length=None if mean is None else label + mean / _BYTES_PER_TOKEN,
        table=table.number,
    )
