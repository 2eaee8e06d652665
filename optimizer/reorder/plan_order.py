"""From sampled rows to the order table of a query: one field order, and orders of their own for heavy groups.

The sample holds hashes and lengths, no values. What is planned must hold for rows that the sample did not hold, so a
group is made only where it is heavy in the whole table, and all of them only where they gain enough together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.expected import Prefix, Sample, distinct_in, numbered
from spark_llm.optimizer.reorder.fixed import best_fixed_order
from spark_llm.optimizer.reorder.hashing import Hashes
from spark_llm.optimizer.reorder.order_table import OrderTable, mix
from spark_llm.optimizer.reorder.plan_groups import grouped_table

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Share of the field tokens that groups must find beyond the best single order.
_GAIN = 0.01
# Of ways to make groups that share about as much, the one with the fewest groups.
_ALIKE = 0.002
_LIMITS = (4096, 512, 64)
# How groups are taken, and how fields stand inside one: see ``Taking`` and ``grouped_table``.
_WAYS = ((None, None), (None, 0.5), (1.2, None), (1.2, 0.5))
_LARGEST = 64
# Planning takes about a second: of wide tables it looks at fewer rows.
_MAX_CELLS, _LEAST_ROWS = 300_000, 2_000


class FieldStatistics(NamedTuple):
    """Of one field in the whole table. ``distinct``: values, estimated where not known; ``length``: mean, in tokens;
    ``score``: ``length² · (rows / distinct − 1)``, what its repetition is worth."""

    distinct: float
    length: float
    score: float


@dataclass(frozen=True)
class Decision:
    """An order table and what is expected of it, for the whole table.

    Shares are of the tokens of fields, 0 to 1, as a prefix cache finds them: with ``table`` (``hits``), with the best
    single order (``fixed_hits``), with fields as written and rows sorted (``written_hits``). ``duplicates``: the share
    of rows that repeat an earlier row. ``cluster_hits``: (top-level group number, rows) of the 64 largest groups,
    largest first. ``fields``: what is known of each field.
    """

    table: OrderTable
    hits: float
    fixed_hits: float
    written_hits: float
    duplicates: float
    cluster_hits: list[tuple[int, float]]
    fields: list[FieldStatistics]


def plan_order(
    hashes: Hashes,
    lengths: Floats,
    *,
    total_rows: int | None = None,
    distinct: Sequence[int | None] | None = None,
    may_group: bool = True,
) -> Decision:
    """Plan the order table of a query. Pure: the same arguments give the same table.

    ``hashes``: uint64 [rows, fields] (``hash_values``) of random rows of a table of ``total_rows`` (None: of all);
    ``lengths``: float64 [rows, fields], each cell's in tokens, label included. ``distinct``: the number of distinct
    values of each field in the whole table, where known. Raises ValueError where shapes do not agree.
    """
    rows, fields = hashes.shape
    if lengths.shape != hashes.shape or (distinct is not None and len(distinct) != fields):
        raise ValueError(f"{rows} x {fields} hashes, but lengths {lengths.shape} or distinct counts do not fit")
    total = max(rows, total_rows or 0)
    cells = np.empty((rows, fields), np.int64)
    statistics, start = [], 0
    for field in range(fields):
        number, _, counts = numbered(hashes[:, field])
        cells[:, field] = start + number
        start += len(counts)
        known = distinct[field] if distinct is not None else None
        estimate = float(known) if known else distinct_in(counts, total)
        length = float(lengths[:, field].mean()) if rows else 0.0
        score = length * length * (total / max(min(estimate, total), 1) - 1)
        statistics.append(FieldStatistics(estimate, length, score))
    written = np.arange(fields)
    if not rows or not fields:
        return Decision(OrderTable.fixed(written.tolist()), 0.0, 0.0, 0.0, 0.0, [], statistics)
    sample = Sample(cells, lengths.astype(np.float64), total)
    by_score = np.argsort([-s.score for s in statistics], kind="stable")
    by_length = np.argsort([-s.length * (1 - s.distinct / total) for s in statistics], kind="stable")
    planned, of = sample.at_most(max(_MAX_CELLS // fields, _LEAST_ROWS))
    fixed = best_fixed_order(planned, (by_length, by_score))
    written_hits, fixed_hits = (sample.hits(np.broadcast_to(order, cells.shape)) for order in (written, fixed))
    table, hits = OrderTable.fixed(fixed.tolist()), fixed_hits
    if may_group and fields > 1:
        grouped = _grouped(planned, hashes[of], fixed)
        if grouped is not None:
            table, hits = grouped, sample.hits(grouped.orders(hashes))
    return Decision(
        table=table,
        hits=hits,
        fixed_hits=fixed_hits,
        written_hits=written_hits,
        duplicates=1 - _whole(sample).share,
        cluster_hits=_clusters(table, hashes, total),
        fields=statistics,
    )


def _grouped(sample: Sample, hashes: Hashes, fixed: Ints) -> OrderTable | None:
    """The table with groups that shares most; None where no table shares enough more than ``fixed``.

    Groups of a sample fit that sample: where it is only a part of the table, a way of making them is judged by rows
    that did not take part.
    """
    rows = len(hashes)
    made, judged = np.arange(rows), np.arange(rows)
    if sample.total_rows > rows:
        is_made = mix(np.arange(rows, dtype=np.uint64), np.uint64(2)) & np.uint64(1) == 0
        made, judged = np.flatnonzero(is_made), np.flatnonzero(~is_made)
    if not len(made) or not len(judged):
        return None
    making, judging = (Sample(sample.cells[r], sample.lengths[r], sample.total_rows) for r in (made, judged))
    single = judging.hits(np.broadcast_to(fixed, judging.cells.shape))
    tried: list[_Tried] = []

    def judge(way: tuple[float | None, float | None], limit: int) -> None:
        table = grouped_table(making, hashes[made], fixed, limit, *way)
        tried.append(_Tried(judging.hits(table.orders(hashes[judged])), table, way, limit))

    for way in _WAYS:
        judge(way, _LIMITS[0])
    best = max(tried, key=lambda one: one.hits)
    for limit in _LIMITS[1:]:
        if best.table.num_groups > limit:
            judge(best.way, limit)
    most = max(one.hits for one in tried)
    if most < single + _GAIN:
        return None
    alike = [one for one in tried if one.hits >= most - _ALIKE]
    chosen = min(alike, key=lambda one: (one.table.num_groups, -one.hits))
    if len(made) == rows:
        return chosen.table
    return grouped_table(sample, hashes, fixed, chosen.limit, *chosen.way)


class _Tried(NamedTuple):
    hits: float
    table: OrderTable
    way: tuple[float | None, float | None]
    limit: int


def _whole(sample: Sample) -> Prefix:
    """The prefixes that are whole rows."""
    prefix = Prefix.empty(len(sample.cells))
    for field in range(sample.cells.shape[1]):
        prefix = prefix.longer(sample.cells[:, field], sample.total_rows)
    return prefix


def _clusters(table: OrderTable, hashes: Hashes, total_rows: int) -> list[tuple[int, float]]:
    group = table.place(hashes).group
    counts = np.bincount(group[group >= 0], minlength=1)
    largest = np.argsort(-counts, kind="stable")[:_LARGEST]
    return [(int(g), float(counts[g]) * total_rows / len(hashes)) for g in largest if counts[g]]
