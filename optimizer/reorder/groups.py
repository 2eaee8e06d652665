"""Group-first field orders of a coded table: rows that share heavy cells are put together, and again inside each group.

What GGR (Liu et al., arXiv 2403.05821) does one group at a time is done here for all groups of one depth at once, on
flat arrays: a group is taken when it is the best of every row that it holds, which is what taking them from a heap,
best first, comes to. Nothing is ever counted anew; fields that always come together are found, not declared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.order_table import mix

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def fixed_order(cells: Ints, weights: Floats) -> Ints:
    """The fields by ``mean weight · (rows / distinct − 1)``, greatest first: the best single order by statistics.

    ``cells`` [rows, fields] and ``weights`` [cell ids] are those of ``group_orders``.
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


def group_orders(cells: Ints, weights: Floats, damping: float, tail: Ints) -> Ints:
    """The field order of each row, int64 [rows, fields].

    ``cells`` [rows, fields]: the number of each cell, equal where cells of a field are, never the same in two fields;
    the numbers of a field are adjacent. ``weights`` [cell numbers]: what it is worth to find the cell in a prefix.
    Groups are taken by ``weight · (rows − 1) / rows^damping``: 0 is GGR's score, 1 the gain of each row. ``tail``: the
    fields in the order of those that share nothing.
    """
    rows, fields = cells.shape
    rank = np.empty(fields, np.int64)
    rank[tail] = np.arange(fields)
    depth = np.full((rows, fields), fields, np.int32)  # at which level a field is shared
    row_hash = (mix(np.arange(rows, dtype=np.uint64), np.uint64(0)) >> np.uint64(11)).astype(np.float64)

    useful = ((np.bincount(cells.ravel(), minlength=len(weights)) > 1) & (weights > 0))[cells]
    row, field = np.nonzero(useful)
    group = cells[useful]
    group, weight = _dense(group, weights[group])
    for level in range(fields):
        if not len(row):
            break
        leader = _lead(row, group, weight, row_hash, damping)
        # Cells of led rows go on to the next level; those that all rows of the new group have are shared at this one.
        node = leader[row]
        led = node >= 0
        row, field, group, node = row[led], field[led], group[led], node[led]
        if not len(row):
            break
        size = np.bincount(leader[leader >= 0], minlength=len(weight))
        inner, count, cell_weight = _split(node, group, weight)
        count_of = count[inner]
        shared = count_of == size[node]
        depth[row[shared], field[shared]] = level
        goes_on = ~shared & (count_of > 1)
        row, field, inner = row[goes_on], field[goes_on], inner[goes_on]
        group, weight = _dense(inner, cell_weight[inner])
    # Of a row no two fields have the same key, so the key tells the field.
    keys = np.sort(depth * np.int32(fields) + rank.astype(np.int32), axis=1)
    orders: Ints = tail[keys % fields]
    return orders


def _dense(group: Ints, weight_of: Floats) -> tuple[Ints, Floats]:
    """Groups numbered anew without gaps, in the same order, and the weight of each; ``weight_of``: of each cell."""
    if not len(group):
        return group, np.empty(0)
    used = np.zeros(int(group.max()) + 1, np.bool_)
    used[group] = True
    dense = (np.cumsum(used) - 1)[group]
    weight = np.empty(int(np.count_nonzero(used)))
    weight[dense] = weight_of
    return dense, weight


def _split(node: Ints, group: Ints, weight: Floats) -> tuple[Ints, Ints, Floats]:
    """The parts of groups inside nodes: of each cell its part's number, of each part its count and weight."""
    key, by = _sorted(node * len(weight) + group)
    starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    count = np.diff(np.append(starts, len(key)))
    inner = np.empty(len(key), np.int64)
    inner[by] = np.repeat(np.arange(len(starts)), count)
    return inner, count, weight[group[by[starts]]]


def _sorted(keys: Ints) -> tuple[Ints, Ints]:
    """The keys in order, and where each stood. Sorting is several times as fast as sorting places by keys."""
    bits = (len(keys) - 1).bit_length()
    if int(keys.max()).bit_length() + bits > 63:
        by = np.argsort(keys, kind="stable")
        return keys[by], by
    packed = np.sort((keys << bits) | np.arange(len(keys)))
    return packed >> bits, packed & ((1 << bits) - 1)


def _lead(row: Ints, group: Ints, weight: Floats, row_hash: Floats, damping: float) -> Ints:
    """The group that each row goes to, -1 for none, int64 [rows]. Cells are given by row."""
    leader = np.full(len(row_hash), -1, np.int64)
    groups = len(weight)
    row, group, weight = _merge_equal(row, group, weight, row_hash)
    while len(row):
        count = np.bincount(group, minlength=groups)
        divided = count - 1.0 if damping == 0 else (count - 1) / np.maximum(count, 1) ** damping
        score = (weight * divided)[group]
        starts = np.flatnonzero(np.concatenate(([True], row[1:] != row[:-1])))
        cells = np.diff(np.append(starts, len(row)))
        best = np.repeat(np.maximum.reduceat(score, starts), cells)
        # Of equal scores the lowest group counts, for all rows alike, so one group at least is every row's best.
        choice = np.minimum.reduceat(np.where(score == best, group, groups), starts)
        won = (np.bincount(choice, minlength=groups) == count)[choice]
        leader[row[starts[won]]] = choice[won]
        left = np.repeat(~won, cells)
        row, group = row[left], group[left]
        # A group that is down to one row gains nothing any more.
        left = (np.bincount(group, minlength=groups) > 1)[group]
        row, group = row[left], group[left]
    return leader


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
    merged: Floats = np.bincount(same_as, weights=weight, minlength=len(weight))
    return row[kept], group[kept], merged
