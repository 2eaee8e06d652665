"""In which order a group asks the calls of a filter, learnt from answers that it needed anyway.

The call that drops a row for the fewest tokens comes first: with independent conditions, ascending cost divided by the
share of rows dropped is the order of least cost (Hellerstein and Stonebraker, SIGMOD 1993, "Predicate Migration").
While nothing is known, a few rows take turns in which call they begin with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

MOST_SPENT = 64  # calls that a query may make to learn, beyond those that the best order needs
_REMEMBERED = 64  # queries of a worker process


class PredicateOrder:
    """What is known of the calls of one filter. ``left``: rows that are still to take turns in their first call."""

    def __init__(self, calls: int, sharers: int = 1) -> None:
        """sharers: how many worker processes learn beside each other."""
        self._asked = np.zeros(calls)
        self._dropped = np.zeros(calls)
        self._received = np.zeros(calls)
        self._tokens = np.zeros(calls)
        self._turns = 0
        # Of so many rows (calls - 1) / calls begin with a call that is not the best, and cost calls - 1 at most.
        self.left = min(MOST_SPENT, MOST_SPENT * calls // max(1, calls - 1) ** 2) // sharers if calls > 1 else 0
        self.left = max(self.left, calls) if calls > 1 else 0

    def judged(self, call: int, asked: int, dropped: int) -> None:
        """Take note of rows that a call was asked about, and how many of them its answer dropped."""
        self._asked[call] += asked
        self._dropped[call] += dropped

    def received(self, call: int, answers: int, tokens: int) -> None:
        """Take note of the tokens, prompt and output, of so many answers."""
        self._received[call] += answers
        self._tokens[call] += tokens

    def order(self) -> list[int]:
        """The calls, the cheapest for a dropped row first; as written where nothing tells them apart."""
        costs = self._tokens / np.maximum(1, self._received) + 1
        shares = (self._dropped + 1) / (self._asked + 2)
        return [int(call) for call in np.argsort(costs / shares, kind="stable")]

    def plan(self, rows: int) -> npt.NDArray[np.int64]:
        """int64 [rows, calls]: for each row of a window the calls in the order in which they are asked."""
        order = self.order()
        if not self.left:
            return np.tile(np.array(order, np.int64), (rows, 1))
        self.left = max(0, self.left - rows)
        turns = [[*order[turn:], *order[:turn]] for turn in range(len(order))]
        # Drawn, as rows in prompt order may alternate, too; and the same ones in every run.
        first = np.random.default_rng(self._turns).permutation(np.arange(rows) % len(order))
        self._turns += rows
        planned: npt.NDArray[np.int64] = np.array(turns, np.int64)[first]
        return planned


_orders: OrderedDict[Hashable, PredicateOrder] = OrderedDict()  # of this worker process


def predicate_order(key: Hashable, calls: int, sharers: int = 1) -> PredicateOrder:
    """What this process knows of a filter: ``key`` names it and its query, so that later tasks go on with it."""
    if key not in _orders:
        _orders[key] = PredicateOrder(calls, sharers)
        while len(_orders) > _REMEMBERED:
            _orders.popitem(last=False)
    return _orders[key]
