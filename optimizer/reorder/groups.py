"""Group-first field orders of a coded table: rows that share heavy cells are put together, and again inside each group.

What GGR (Liu et al., arXiv 2403.05821) does one group at a time is done here for all groups of one depth at once, on
flat arrays: a group is taken when it is the best of every row that it holds, which is what taking them from a heap,
best first, comes to. Nothing is ever counted anew; fields that always come together are found, not declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.order_table import mix

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Taking(NamedTuple):
    """How groups are taken: by ``weight · log(count)``, greatest first, or where ``damping`` is given by
    ``weight · (count − 1) / count^damping``.

    Damping 0 is GGR's score, which large groups of light cells win; 1 is the gain of each row, which heavy cells win,
    however few rows they have. The logarithm stands between them. ``count`` is that of the rows, times ``scale`` where
    they are a sample; only groups of at least ``least`` rows are taken.
    """

    damping: float | None = None
    scale: float = 1.0
    least: int = 2

    def score(self, weight: Floats, count: Ints) -> Floats:
        rows = np.maximum(count * self.scale, 1.0)
        repeats = np.log(rows) if self.damping is None else (rows - 1) / rows**self.damping
        score: Floats = weight * repeats
        return score


class Level(NamedTuple):
    """The groups of one depth.

    ``leader``: int64 [rows], the cell that leads each row's group, -1 for rows that have none. ``row`` and ``field``:
    the cells that all rows of a group share, the leader among them. ``group``: int64 [rows], the number of each row's
    group, -1 for none; ``score``: float64 [numbers], the score at which each was taken.
    """

    leader: Ints
    row: Ints
    field: Ints
    group: Ints
    score: Floats


def fixed_order(cells: Ints, weights: Floats) -> Ints:
    """The fields by ``mean weight · (rows / distinct − 1)``, greatest first: the best single order by statistics.

    ``cells`` [rows, fields] and ``weights`` [cell numbers] are those of ``group_orders``.
    """
    rows, fields = cells.shape
    if not rows:
        return np.arange(fields)
    seen = np.zeros(len(weights), np.bool_)
    scores = np.empty(fields)
    for field in range(fields):
        column = cells[:, field]
        seen[column] = True
        scores[field] = weights[column].mean() * (rows / np.count_nonzero(seen[column.min() : column.max() + 1]) - 1)
    return np.argsort(-scores, kind="stable")


def group_orders(cells: Ints, weights: Floats, taking: Taking, tail: Ints) -> Ints:
    """The field order of each row, int64 [rows, fields].

    ``cells`` [rows, fields]: the number of each cell, equal where cells of a field are, never the same in two fields;
    the numbers of a field are adjacent. ``weights`` [cell numbers]: what it is worth to find the cell in a prefix.
    ``tail``: the fields in the order of those that share nothing.
    """
    rows, fields = cells.shape
    rank = np.empty(fields, np.int32)
    rank[tail] = np.arange(fields)
    depth = np.full((rows, fields), fields, np.int32)  # at which level a field is shared
    for number, level in enumerate(levels(cells, weights, taking)):
        depth[level.row, level.field] = number
    # Of a row no two fields have the same key, so the key tells the field.
    keys = np.sort(depth * np.int32(fields) + rank, axis=1)
    orders: Ints = tail[keys % fields]
    return orders


def levels(cells: Ints, weights: Floats, taking: Taking) -> Iterator[Level]:
    """Take groups of all rows, then groups inside these, and so on, while rows share anything more."""
    rows = len(cells)
    row_hash = (mix(np.arange(rows, dtype=np.uint64), np.uint64(0)) >> np.uint64(11)).astype(np.float64)
    useful = ((np.bincount(cells.ravel(), minlength=len(weights)) >= taking.least) & (weights > 0))[cells]
    row, field = np.nonzero(useful)
    cell = cells[useful]
    group = cell
    while len(row):
        group, first = _dense(group)
        cell_of = cell[first]
        weight = weights[cell_of]
        leader, score = _lead(row, group, weight, row_hash, taking)
        # Cells of led rows go on to the next level; those that all rows of the new group have are shared at this one.
        node = leader[row]
        led = node >= 0
        row, field, cell, group, node = row[led], field[led], cell[led], group[led], node[led]
        if not len(row):
            return
        size = np.bincount(leader[leader >= 0], minlength=len(weight))
        group, count = _split(node, group, len(weight))
        shared = count == size[node]
        yield Level(np.where(leader >= 0, cell_of[leader], -1), row[shared], field[shared], leader, score)
        goes_on = ~shared & (count >= taking.least)
        row, field, cell, group = row[goes_on], field[goes_on], cell[goes_on], group[goes_on]


def _dense(group: Ints) -> tuple[Ints, Ints]:
    """Groups numbered anew without gaps, in the same order, and for each a place where it stands."""
    place = np.full(int(group.max()) + 1, -1, np.int64)
    place[group] = np.arange(len(group))
    used = place >= 0
    return (np.cumsum(used) - 1)[group], place[used]


def _split(node: Ints, group: Ints, groups: int) -> tuple[Ints, Ints]:
    """The parts of groups inside nodes: of each cell its part's number and its part's count."""
    key, by = _sorted(node * groups + group)
    starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    count = np.diff(np.append(starts, len(key)))
    part, count_of = np.empty(len(key), np.int64), np.empty(len(key), np.int64)
    part[by] = np.repeat(np.arange(len(starts)), count)
    count_of[by] = np.repeat(count, count)
    return part, count_of


def _sorted(keys: Ints) -> tuple[Ints, Ints]:
    """The keys in order, and where each stood. Sorting is faster than sorting places by keys."""
    bits = (len(keys) - 1).bit_length()
    if int(keys.max()).bit_length() + bits > 63:
        by = np.argsort(keys, kind="stable")
        return keys[by], by
    packed = np.sort((keys << bits) | np.arange(len(keys)))
    return packed >> bits, packed & ((1 << bits) - 1)


def _lead(row: Ints, group: Ints, weight: Floats, row_hash: Floats, taking: Taking) -> tuple[Ints, Floats]:
    """The group that each row goes to, -1 for none, and the score at which each group was taken. Cells stand by row."""
    leader = np.full(len(row_hash), -1, np.int64)
    groups = len(weight)
    taken_at = np.zeros(groups)
    row, group, weight = _merge_equal(row, group, weight, row_hash)
    while len(row):
        count = np.bincount(group, minlength=groups)
        score = taking.score(weight, count)
        scores = score[group]
        starts = np.flatnonzero(np.concatenate(([True], row[1:] != row[:-1])))
        cells = np.diff(np.append(starts, len(row)))
        best = np.repeat(np.maximum.reduceat(scores, starts), cells)
        # Of equal scores the lowest group counts, for all rows alike, so one group at least is every row's best.
        choice = np.minimum.reduceat(np.where(scores == best, group, groups), starts)
        is_best = np.bincount(choice, minlength=groups) == count
        won = is_best[choice]
        leader[row[starts[won]]] = choice[won]
        taken_at[choice[won]] = score[choice[won]]
        left = np.repeat(~won, cells)
        row, group = row[left], group[left]
        # A group that is down to one row gains nothing any more.
        left = (np.bincount(group, minlength=groups) >= taking.least)[group]
        row, group = row[left], group[left]
    return leader, taken_at


def _merge_equal(row: Ints, group: Ints, weight: Floats, row_hash: Floats) -> tuple[Ints, Ints, Floats]:
    """Groups of the same rows (fields that determine each other there) as one, which weighs what they weigh together.

    Sums of random numbers over the rows tell groups apart. Cells stand by row, so equal groups add up in the same
    order, to the same bits.
    """
    sums = np.bincount(group, weights=row_hash[row])
    by = np.argsort(sums, kind="stable")
    first = np.concatenate(([True], sums[by[1:]] != sums[by[:-1]]))
    if first.all():
        return row, group, weight
    same_as = np.empty(len(by), np.int64)
    same_as[by] = by[np.maximum.accumulate(np.where(first, np.arange(len(by)), 0))]
    kept = same_as[group] == group
    merged = np.asarray(np.bincount(same_as, weights=weight, minlength=len(weight)), np.float64)
    return row[kept], group[kept], merged
