"""Field orders of tables with few rows, where there is time to look ahead: each choice is tried out before it is made.

A policy that takes the best (field, value) group by its score is improved by rollouts: for each group that could come
first, the rest is played by the policy, and the group with the best outcome is taken. Twice improved, it is rarely
off the optimum; it is not a search for it. Sets of rows are bit masks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MAX_CELLS = 1024
_MAX_ROWS = 128  # the policy plays group after group, each a level of recursion
_LOOKAHEAD = 2
# Groups that a lookahead may weigh, some tenths of a second; beyond, the table is too large for it.
_BUDGET = 200_000


class _Group(NamedTuple):
    rows: int
    fields: int
    gain: float  # of each row but the first


class _Play(NamedTuple):
    hits: float
    common: _Group | None  # the cells that all rows have
    first: _Group | None


class _TooLargeError(Exception):
    pass


def small_orders(cells: Ints, weights: Floats, tail: Ints) -> list[Ints]:
    """Field orders by lookahead, int64 [rows, fields] each, of the deepest lookahead that the table is small enough
    for; none where it is too large for any. Arguments as for ``group_orders``."""
    if len(cells) > _MAX_ROWS:
        return []
    for depth in range(_LOOKAHEAD, 0, -1):
        player = _Player(cells, weights)
        try:
            return [player.orders(depth, tail)]
        except _TooLargeError:
            continue
    return []


class _Player:
    def __init__(self, cells: Ints, weights: Floats) -> None:
        self.count, self.fields = cells.shape
        self.budget = _BUDGET
        self.groups: list[tuple[int, int, float]] = []
        self.moves_of: dict[tuple[int, int], tuple[_Group | None, list[_Group]]] = {}
        self.plays: dict[tuple[int, int, int], _Play] = {}
        for field in range(self.fields):
            masks: dict[int, int] = {}
            for row, cell in enumerate(cells[:, field].tolist()):
                masks[cell] = masks.get(cell, 0) | 1 << row
            for cell, mask in masks.items():
                if mask & (mask - 1) and weights[cell] > 0:
                    self.groups.append((mask, 1 << field, float(weights[cell])))

    def spend(self, groups: int) -> None:
        self.budget -= groups
        if self.budget < 0:
            raise _TooLargeError

    def moves(self, rows: int, fields: int) -> tuple[_Group | None, list[_Group]]:
        """The cells common to all of ``rows``, and the groups that could come first, best score first."""
        known = self.moves_of.get((rows, fields))
        if known is not None:
            return known
        self.spend(len(self.groups))
        merged: dict[int, tuple[int, float]] = {}  # fields with the same rows come together
        for mask, field, weight in self.groups:
            group = mask & rows
            if field & fields and group & (group - 1):
                before, gain = merged.get(group, (0, 0.0))
                merged[group] = (before | field, gain + weight)
        common = merged.pop(rows, None)
        groups = [_Group(group, *both) for group, both in merged.items()]
        if common:
            groups = [g for g in groups if g.fields & ~common[0]]
        groups.sort(key=lambda group: (-group.gain * (group.rows.bit_count() - 1), group.rows))
        found = (_Group(rows, *common) if common else None, groups)
        self.moves_of[rows, fields] = found
        return found

    def play(self, rows: int, fields: int, depth: int) -> _Play:
        """Play a part of the table, looking ``depth`` choices ahead."""
        if not rows & (rows - 1) or not fields:
            return _Play(0.0, None, None)
        known = self.plays.get((rows, fields, depth))
        if known is not None:
            return known
        common, groups = self.moves(rows, fields)
        hits, left = 0.0, fields
        if common:
            hits, left = common.gain * (rows.bit_count() - 1), fields & ~common.fields
        first = None
        if groups:
            first = groups[0]
            if depth:
                self.spend(len(groups))
                first = max(groups, key=lambda group: self.outcome(group, rows, left, depth - 1))
            hits += self.outcome(first, rows, left, depth)
        played = self.plays[rows, fields, depth] = _Play(hits, common, first)
        return played

    def outcome(self, group: _Group, rows: int, fields: int, depth: int) -> float:
        """The hits if ``group`` comes first."""
        inside = self.play(group.rows, fields & ~group.fields, depth).hits
        outside = self.play(rows & ~group.rows, fields, depth).hits
        return group.gain * (group.rows.bit_count() - 1) + inside + outside

    def orders(self, depth: int, tail: Ints) -> Ints:
        orders = np.empty((self.count, self.fields), np.int64)
        last = tail.tolist()
        parts: list[tuple[int, int, list[int]]] = [((1 << self.count) - 1, (1 << self.fields) - 1, [])]
        while parts:
            rows, fields, head = parts.pop()
            _, common, first = self.play(rows, fields, depth)
            if common:
                head = head + [field for field in last if common.fields >> field & 1]
                fields &= ~common.fields
            if first:
                parts.append((rows & ~first.rows, fields, head))
                inner = [field for field in last if first.fields >> field & 1]
                parts.append((first.rows, fields & ~first.fields, head + inner))
            else:
                order = head + [field for field in last if fields >> field & 1]
                for row in range(self.count):
                    if rows >> row & 1:
                        orders[row] = order
        return orders
