"""How many partitions a call's rows go to, and by which key: ReorderRows' arithmetic (CONTRACTS.md 8 and 9)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.optimizer.rules.calls import Call
from spark_llm.optimizer.statistics import InputStatistics
from spark_llm.optimizer.statistics.values import Floats, Hashes

ENGINE_SECONDS = 60.0  # of work in a partition: what a lost task loses
_FEW_ROWS = 8
Spread = tuple[tuple[int, tuple[int, ...]], ...]

_NO_SPREAD: Spread = ()
_SKEWED = 1.5  # rows of a value, in partitions, from which they are spread
_MOST_SPREAD = 64  # values
_GROUPS_EACH = 4  # keys a partition, so that hashing fills partitions alike
_LOST = 0.005  # share of all tokens that a longer key may make be computed again
_LEAST_TOGETHER = 64  # rows of a value that stay together: each place computes their prefix anew
_UNIQUE = 0.98  # distinct values a row from which nothing is expected to meet


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """``count`` partitions, 0: no exchange. table: the encoded order table whose groups are the keys, None: the keys
    are columns. depth: how many leading cells of a prompt are the key. spread: (places, hashes) of last cells of keys
    (with ``table``: of its cells) whose rows are too many for one partition and go to that many places. why: for
    EXPLAIN."""

    count: int
    why: str
    table: bytes | None = None
    depth: int = 1
    spread: Spread = ()

    def expressions(self, columns: Sequence[Expression], catalyst: Catalyst) -> list[Expression]:
        """What the exchange hashes, from the columns that the rows are sorted by."""
        make = catalyst.expressions
        if self.table is not None:
            place = columns[0]
            keys = [make.Substring(place, catalyst.number(1), catalyst.number(8 * self.depth))]
            last = make.Substring(place, catalyst.number(8 * self.depth - 7), catalyst.number(8))
            rest = [place]
        else:
            keys, rest = list(columns[: self.depth]), list(columns[self.depth :])
            last = make.XxHash64(catalyst.seq(keys[-1:]))
        if not self.spread or not rest:
            return keys
        where = catalyst.long(0)
        for places, hashes in self.spread:
            values = [self._literal(hashed, catalyst) for hashed in hashes]
            is_one = make.In(last, catalyst.seq(values))
            where = make.If(is_one, catalyst.modulo(make.XxHash64(catalyst.seq(rest)), places), where)
        return [*keys, where]

    def _literal(self, hashed: int, catalyst: Catalyst) -> Expression:
        if self.table is not None:
            return catalyst.binary(hashed.to_bytes(8, "big"))
        return catalyst.long(np.uint64(hashed).astype(np.int64).item())


def partitioning(call: Call, context: Context, asked_for: bool) -> Partitioning:
    """The partitioning of the rows below ``call``. asked_for: the user chose the one that they have."""
    layout = call.spec.prompt
    table = context.tables.get(layout.table) if layout is not None and layout.table is not None else None
    if asked_for:
        return Partitioning(0, "sorted in the partitions that the query asks for", table)
    known = context.statistics.of(call, context)
    work = None if known.rows is None else _tokens(call, known, context)
    if reason := _no_exchange(call, known, work, context):
        return Partitioning(0, f"sorted in their partitions: {reason}", table)
    count = _count(known, work, context)
    depth, spread = 1, _NO_SPREAD
    if count > 1 and known.hashes is not None and len(known.hashes) and _leads_with_field(call):
        order_table = OrderTable.decode(table) if table is not None else OrderTable.fixed(_order(call))
        cells = order_table.place(known.hashes).key
        depth = _depth(cells, _cell_lengths(known, order_table), count)
        orders = order_table.orders(known.hashes)[:, depth - 1 : depth]
        last = cells[:, depth - 1] if table is not None else np.take_along_axis(known.hashes, orders, axis=1)[:, 0]
        spread = _spread(cells[:, :depth], last, known.rows or len(cells), count)
    heavy = sum(len(hashes) for _, hashes in spread)
    by = "group or first field" if table is not None else ", ".join(_lead_names(call)[:depth]) or "their prompt"
    also = f", {heavy} heavy ones spread" if heavy else ""
    return Partitioning(count, f"sorted in {count} partitions by {by}{also}", table, depth, spread)


def _order(call: Call) -> Sequence[int]:
    layout = call.spec.prompt
    return layout.fields if layout is not None and layout.fields else range(len(call.fields))


def _leads_with_field(call: Call) -> bool:
    layout = call.spec.prompt
    return bool(call.fields) and (call.has_constant_prompt or (layout is not None and layout.instruction_last))


def _lead_names(call: Call) -> list[str]:
    """What the rows are hashed by, in words, at most: what a prompt begins with that is not constant."""
    if not _leads_with_field(call):
        return ["their prompt"]
    return [call.names[number] for number in _order(call) if not call.fields[number].foldable()]


def _tokens(call: Call, known: InputStatistics, context: Context) -> float:
    """About the tokens of all rows' prompts, none of them shared."""
    assert known.rows is not None
    fields = known.row_length
    per_row = 64.0 * len(call.fields) if fields is None else fields
    if not call.has_constant_prompt:
        per_row += 64.0 if known.prompt is None or known.prompt.length is None else known.prompt.length
    return known.rows * per_row


def _no_exchange(call: Call, known: InputStatistics, work: float | None, context: Context) -> str | None:
    if context.partitions:
        return None
    if known.rows is not None and known.rows <= _FEW_ROWS:
        return f"there are {known.rows} rows"
    budget = context.tokens_per_second * ENGINE_SECONDS
    if known.partitions == 1 and (context.slots == 1 or (work is not None and work <= 2 * budget)):
        return "there is one partition"
    distinct = [column.distinct for column in (*known.columns, *([known.prompt] if known.prompt else []))]
    if known.rows and known.partitions and all(d is not None and d >= _UNIQUE * known.rows for d in distinct):
        needed = 1 if work is None else math.ceil(work / budget)
        if known.partitions >= max(context.slots, needed):
            return "no value repeats"
    return None


def _count(known: InputStatistics, work: float | None, context: Context) -> int:
    if context.partitions:
        return context.partitions
    if known.rows is None or work is None:
        return max(context.slots, known.partitions or int(context.session.sessionState().conf().numShufflePartitions()))
    needed = math.ceil(work / (context.tokens_per_second * ENGINE_SECONDS))
    return max(1, min(max(context.slots, needed), known.rows // 4))


def _cell_lengths(known: InputStatistics, table: OrderTable) -> Floats:
    """Tokens of each sampled row's cells in the order of its prompt."""
    assert known.hashes is not None
    assert known.lengths is not None
    return np.take_along_axis(known.lengths, table.orders(known.hashes), axis=1)


def _depth(cells: Hashes, lengths: Floats, count: int) -> int:
    """How many leading cells make a key that few enough rows share, as far as that costs next to no shared tokens.

    A short leading cell with few values (a year) would leave most partitions empty. cells: [rows, positions].
    """
    depth, groups = 1, _groups(cells[:, :1])
    while depth < cells.shape[1]:
        sizes = np.bincount(groups)
        if len(sizes) >= _GROUPS_EACH * count and sizes.max() <= _SKEWED * len(cells) / count:
            break
        finer = _groups(cells[:, : depth + 1])
        # Each group's key cells are computed once in every partition that its rows come to.
        owners = np.zeros(finer.max() + 1, np.int64)
        owners[finer] = groups
        pieces = np.minimum(np.bincount(owners, minlength=len(sizes)), count)
        shared = np.zeros(len(sizes))
        shared[groups] = lengths[:, :depth].sum(axis=1)
        if (shared * (pieces - 1)).sum() > _LOST * lengths.sum():
            break
        depth, groups = depth + 1, finer
    return depth


def _groups(cells: Hashes) -> npt.NDArray[np.int64]:
    """A number for each row, equal for rows with equal cells."""
    numbers = np.zeros(len(cells), np.int64)
    for position in range(cells.shape[1]):
        values = np.unique(cells[:, position], return_inverse=True)[1].reshape(-1)
        numbers = np.unique(numbers * (values.max() + 1) + values, return_inverse=True)[1].reshape(-1)
    return numbers


def _spread(cells: Hashes, last: Hashes, total_rows: int, count: int) -> Spread:
    """The ``last`` cells of keys with more rows than a partition should have, by the number of places they go to."""
    groups = _groups(cells)
    _, first, sampled = np.unique(groups, return_index=True, return_counts=True)
    rows = sampled * (total_rows / len(cells))
    heavy = np.flatnonzero(rows > _SKEWED * total_rows / count)
    heavy = heavy[np.argsort(-rows[heavy], kind="stable")][:_MOST_SPREAD]
    by_places: dict[int, list[int]] = {}
    for one in heavy.tolist():
        places = min(rows[one] * count / total_rows, rows[one] / _LEAST_TOGETHER)
        if places >= 2:
            by_places.setdefault(1 << int(math.log2(places)), []).append(int(last[first[one]]))
    return tuple((places, tuple(sorted(set(found)))) for places, found in sorted(by_places.items()))
