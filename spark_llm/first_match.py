"""Which pairs of a join are asked next where one match of a left row is enough: semi and anti joins, EXISTS, IN.

A left row's pairs are asked in rounds of 1, 2, 4 ... pairs, and none any more after a round with a match. The left rows
of a window have their rounds at the same time, so that the engine has work.

Bound: let a left row's first match be its p-th pair, in the order in which they come. Rounds before the one that asks
it have 1, 3, 7 ... < p pairs in all, and each round has one more than all before it: at most 2 p - 1 pairs are asked.
Without a match each pair is asked, once. So it is for pairs that one task has; each other task with pairs of the same
left row begins anew. Where k pairs share a prompt, rounds have k, 2 k, 4 k ..., and the bound holds for prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# left rows of a task, beside those of windows in flight; one that is forgotten begins anew
REMEMBERED_ROWS = 1 << 17


@dataclass(slots=True, eq=False)
class _LeftRow:
    """asked: how many of its pairs had their round. window: number of the one whose turn it is, None: any one's."""

    asked: int = 0
    matched: bool = False
    window: int | None = None


@dataclass(slots=True, eq=False)
class PairWindow:
    """The pairs of a window. ids: int64 [left rows], ascending. left: int64 [pairs], the place of each pair's left row
    in ``ids``. had: bool [pairs], those that had their round. holds: places of the left rows whose turn it is here.
    stuck: number of ``FirstMatches.changes`` when all that was left waited for earlier windows."""

    number: int
    ids: Ints
    left: Ints
    had: Bools
    holds: set[int] = field(default_factory=set)
    stuck: int = -1


class FirstMatches:
    """What a task knows of its left rows. Windows with pairs of the same left row take turns, in their order.

    changes: how often a window that waits for others may have got something to do.
    """

    def __init__(self, remembered: int = REMEMBERED_ROWS, first: int = 1) -> None:
        """first: pairs of a left row's first round, as many as share a prompt."""
        self._first = first
        self._rows: OrderedDict[int, _LeftRow] = OrderedDict()
        self._remembered = remembered
        self._windows = 0
        self.changes = 0

    def window(self, ids: Ints) -> PairWindow:
        """The pairs of the next window. ids: int64 [pairs], of their left rows."""
        self._windows += 1
        distinct, left = np.unique(ids, return_inverse=True)
        return PairWindow(self._windows, distinct, left.reshape(-1), np.zeros(len(ids), np.bool_))

    def next_round(self, pairs: PairWindow, alive: Bools) -> Bools:
        """bool [pairs]: those to ask now; none while all left rows have their turn in earlier windows.

        alive: bool [pairs]; pairs of left rows with a match are taken out.
        """
        waiting = alive & ~pairs.had
        counts = np.bincount(pairs.left[waiting], minlength=len(pairs.ids))
        for place in [place for place in pairs.holds if not counts[place]]:
            self._release(pairs, place)
        sizes = np.zeros(len(pairs.ids), np.int64)
        matched = np.zeros(len(pairs.ids), np.bool_)
        for place in np.flatnonzero(counts).tolist():
            row = self._row(int(pairs.ids[place]))
            if row.matched:
                matched[place] = True
                self._release(pairs, place)
            elif row.window is None or row.window >= pairs.number:
                row.window = pairs.number
                pairs.holds.add(place)
                sizes[place] = min(row.asked + self._first, counts[place])
                row.asked += int(sizes[place])
        alive &= ~matched[pairs.left] | pairs.had
        if not sizes.any():
            pairs.stuck = self.changes
        positions = np.flatnonzero(waiting)
        positions = positions[np.argsort(pairs.left[positions], kind="stable")]
        left = pairs.left[positions]
        rank = np.arange(len(left)) - np.searchsorted(left, left)
        chosen = np.zeros(len(alive), np.bool_)
        chosen[positions[rank < sizes[left]]] = True
        pairs.had |= chosen
        return chosen

    def found(self, pairs: PairWindow, hits: Ints, alive: Bools) -> None:
        """Take note of matches, by their positions; no other pair of their left rows stays alive."""
        places = np.unique(pairs.left[hits])
        for place in places.tolist():
            self._row(int(pairs.ids[place])).matched = True
            self.changes += 1
        alive &= ~np.isin(pairs.left, places)

    def _row(self, number: int) -> _LeftRow:
        row = self._rows.setdefault(number, _LeftRow())
        self._rows.move_to_end(number)
        if len(self._rows) > self._remembered:
            oldest, forgotten = self._rows.popitem(last=False)
            if forgotten.window is not None:  # windows wait for the end of its turn
                self._rows[oldest] = forgotten
        return row

    def _release(self, pairs: PairWindow, place: int) -> None:
        pairs.holds.discard(place)
        row = self._row(int(pairs.ids[place]))
        if row.window == pairs.number:
            row.window = None
            self.changes += 1
