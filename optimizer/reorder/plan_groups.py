"""The groups of an order table: which (field, value) groups of a sample get an order of their own, and which order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.dependencies import with_followers
from spark_llm.optimizer.reorder.expected import Sample, numbered
from spark_llm.optimizer.reorder.fixed import best_fixed_order
from spark_llm.optimizer.reorder.groups import Taking, levels
from spark_llm.optimizer.reorder.hashing import Hashes
from spark_llm.optimizer.reorder.order_table import MAX_LEVELS, Group, OrderTable

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Rows that a group must have in the sample: fewer are chance where the sample is a part of the table.
_LEAST_ROWS, _LEAST_NESTED = 3, 8
# What is known of a field inside all groups of one leading field counts as this many rows of each of them.
_PRIOR_ROWS = 8.0
# A field that repeats this often inside a group is shared by the whole of it.
_CONSTANT = 0.97
# Rows outside of all groups get the order that is best for them, if they are enough to tell.
_ENOUGH_OUTSIDE, _OUTSIDE_BUDGET = 1000, 60
_PASSES = 3


_Named = tuple[int, int, int]  # parent, field, hash


def grouped_table(
    sample: Sample, hashes: Hashes, fixed: Ints, limit: int, damping: float | None, power: float | None
) -> OrderTable:
    """A table of at most ``limit`` groups, taken by ``damping`` (see ``Taking``). ``fixed``: the best single order.

    Inside a group, fields that are constant there stand first. The others stand as in ``fixed`` if ``power`` is None,
    else by ``length · hit share / miss share^power``. Groups whose rows share less than by ``fixed`` are left out.
    """
    picked = _pick(sample, hashes, limit, damping)
    alone = sample.row_hits(np.broadcast_to(fixed, sample.cells.shape))
    table = OrderTable.fixed(fixed.tolist())
    for _ in range(_PASSES):
        plain = [Group(*named, table.default_order) for named in picked]
        # First which group each row is in, then the orders from the rows that are really there.
        nodes = OrderTable(table.default_order, plain).nodes(hashes)
        table = OrderTable(table.default_order, _with_orders(picked, nodes, sample, fixed, power))
        gain = sample.row_hits(table.orders(hashes)) - alone
        root = table.place(hashes).group
        gains = np.asarray(np.bincount(root[root >= 0], weights=gain[root >= 0], minlength=len(picked)), np.float64)
        kept = _without_losers(picked, gains)
        if len(kept) == len(picked):
            break
        picked = kept
    outside = np.flatnonzero(nodes == len(picked))
    if _ENOUGH_OUTSIDE < len(outside) < len(nodes):
        order = best_fixed_order(sample.part(outside), (fixed,), _OUTSIDE_BUDGET)
        table = OrderTable(order.tolist(), table.groups)
    return table


def _without_losers(picked: list[_Named], gains: Floats) -> list[_Named]:
    """The groups that are in a top-level group with a gain that is not negative."""
    number: dict[int, int] = {-1: -1}
    kept: list[_Named] = []
    for old, (parent, field, value) in enumerate(picked):
        if parent in number and (parent >= 0 or gains[old] >= 0):
            number[old] = len(kept)
            kept.append((number[parent], field, value))
    return kept


def _pick(sample: Sample, hashes: Hashes, limit: int, damping: float | None) -> list[_Named]:
    """The groups that gain most, parents before children, those of one parent by the order in which they were taken."""
    rows, fields = sample.cells.shape
    scale = sample.total_rows / rows
    flat = sample.cells.ravel()
    weights = np.zeros(int(flat.max()) + 1)
    weights[flat] = sample.lengths.ravel()
    field_of, hash_of = np.empty(len(weights), np.int64), np.empty(len(weights), np.uint64)
    field_of[flat] = np.tile(np.arange(fields), rows)
    hash_of[flat] = hashes.ravel()
    (weights,) = with_followers(sample.cells, weights)
    found: list[tuple[float, int, float, int, int]] = []  # gain, level, score, parent, cell
    above = np.full(rows, -1, np.int64)
    least = _LEAST_ROWS if scale > 1 else 2
    for depth, level in enumerate(levels(sample.cells, weights, Taking(damping, scale, least))):
        if depth == MAX_LEVELS:
            break
        here = np.full(rows, -1, np.int64)
        led = np.flatnonzero(level.group >= 0)
        number, first, count = numbered(level.group[led])
        for row, size in zip(led[first].tolist(), count.tolist(), strict=True):
            cell = int(level.leader[row])
            gain = float(weights[cell]) * (size * scale - 1) if depth == 0 or size >= _LEAST_NESTED else 0.0
            found.append((gain, depth, float(level.score[level.group[row]]), int(above[row]), cell))
        here[led] = len(found) - len(first) + number
        above = here
    gains = np.array([gain for gain, *_ in found])
    kept: set[int] = set()
    for number in np.argsort(-gains, kind="stable").tolist():
        parent = found[number][3]
        if len(kept) < limit and gains[number] > 0 and (parent < 0 or parent in kept):
            kept.add(number)
    in_order = sorted(kept, key=lambda number: (found[number][1], -found[number][2], found[number][4]))
    place = {number: place for place, number in enumerate(in_order)}
    return [
        (place.get(parent, -1), int(field_of[cell]), int(hash_of[cell]))
        for _, _, _, parent, cell in (found[number] for number in in_order)
    ]


def _with_orders(picked: list[_Named], nodes: Ints, sample: Sample, default: Ints, power: float | None) -> list[Group]:
    """The groups with their field orders.

    The head of an order is what the whole group shares: its parent's head, its own field, fields that are constant
    inside. The others follow by what they are worth inside the group.
    """
    fields = sample.cells.shape[1]
    inside = _inside(picked, nodes)
    share, length = _repetition(picked, inside, sample)
    rank = np.empty(fields, np.int64)
    rank[default] = np.arange(fields)
    worth = length * share / (1 - share + 1e-3) ** power if power is not None else np.zeros_like(length)
    heads: list[list[int]] = []
    groups = []
    for number, (parent, field, value) in enumerate(picked):
        head = list(heads[parent]) if parent >= 0 else []
        if field not in head:
            head.append(field)
        by_worth = np.lexsort((rank, -worth[number])).tolist()
        constant = share[number] > _CONSTANT
        head += [f for f in by_worth if constant[f] and f not in head]
        heads.append(head)
        groups.append(Group(parent, field, value, tuple(head + [f for f in by_worth if f not in head])))
    return groups


def _inside(picked: list[_Named], nodes: Ints) -> list[tuple[Ints, Ints]]:
    """Pairs of (rows, group) for each level: every group that a row is inside of, not only the innermost."""
    parents = np.array([parent for parent, _, _ in picked] + [-1], np.int64)
    pairs = []
    rows = np.flatnonzero(nodes < len(picked))
    group = nodes[rows]
    while len(rows):
        pairs.append((rows, group))
        group = parents[group]
        rows, group = rows[group >= 0], group[group >= 0]
    return pairs


def _repetition(picked: list[_Named], inside: list[tuple[Ints, Ints]], sample: Sample) -> tuple[Floats, Floats]:
    """Inside each group, the share of rows whose value of a field an earlier row had, and the field's mean length:
    float64 [groups, fields] both. Small groups borrow from all groups of the same leading field."""
    fields, groups = sample.cells.shape[1], len(picked)
    count = np.zeros(groups)
    distinct, total = np.zeros((groups, fields)), np.zeros((groups, fields))
    for rows, group in inside:
        count += np.bincount(group, minlength=groups)
        for field in range(fields):
            cell = sample.cells[rows, field]
            first = numbered(group * (int(cell.max()) + 1) + cell)[1]
            distinct[:, field] += np.bincount(group[first], minlength=groups)
            total[:, field] += np.bincount(group, weights=sample.lengths[rows, field], minlength=groups)
    size = np.maximum(count, 1)[:, None]
    # Of count rows, count - 1 could repeat an earlier one.
    repeated = np.where(size > 1, (count[:, None] - distinct), 0.0)
    leads = np.array([field for _, field, _ in picked], np.int64)
    pooled, pooled_size = np.zeros((fields, fields)), np.zeros((fields, 1))
    np.add.at(pooled, leads, repeated)
    np.add.at(pooled_size, leads, size - 1)
    prior = (pooled / np.maximum(pooled_size, 1))[leads]
    share = (repeated + _PRIOR_ROWS * prior) / (size - 1 + _PRIOR_ROWS)
    return np.clip(share, 0.0, 1.0), total / size
