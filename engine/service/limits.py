"""How many rows a task asks next where a query needs only n of those that its filter keeps (LIMIT n over a filter).

Windows grow with the rows that all tasks of the engine have finished: 1, 2, 4 ... where there is one task. So a query
that finds its n-th hit early has asked little, and one that finds it late, or never, soon works at full width.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from spark_llm.engine.service.protocol import WindowRequest

KEPT_NODES = 1024  # whose counts are remembered; the ones asked least recently go first


@dataclass(slots=True)
class _Node:
    """What is known of one node of a query's plan.

    hits: by partition, of each attempt at it. done: rows of finished windows, by attempt. asking: attempts that have
    not ended. rows, total: sums of ``done``, and of what each partition counts for.
    """

    hits: dict[int, dict[int, int]] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    asking: set[int] = field(default_factory=set)
    rows: int = 0
    total: int = 0


class Limits:
    """Hands out windows and counts hits, by query and node. Safe to call from several threads.

    A partition counts for the hits of that attempt at it which has the fewest. So when tasks are told to stop at
    ``limit`` hits, the tasks whose rows Spark takes in the end have at least ``limit``, also where it ran a partition
    twice.

    Bound (CONTRACTS.md 12): a window is granted while the f rows that are finished hold too few hits, and has at most
    f + 1 rows, divided among the tasks that ask. With r rows up to the n-th hit f < r. So those finished before the
    last window and that window are at most 2 r rows, and each other task has one window.
    """

    def __init__(self, kept: int = KEPT_NODES) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._nodes: OrderedDict[tuple[str, str], _Node] = OrderedDict()

    def grant(self, request: WindowRequest) -> int:
        """Takes in what the task reports; the rows of its next window, 0 if the limit is reached. limit 0: never."""
        with self._lock:
            node = self._nodes.setdefault((request.query, request.node), _Node())
            self._nodes.move_to_end((request.query, request.node))
            if len(self._nodes) > self._kept:
                self._nodes.popitem(last=False)
            _report(node, request)
            if 0 < request.limit <= node.total:
                return 0
            return max(1, (node.rows + 1) // max(1, len(node.asking)))


def _report(node: _Node, request: WindowRequest) -> None:
    attempts = node.hits.setdefault(request.partition, {})
    before = min(attempts.values(), default=0)
    attempts[request.attempt] = max(request.hits, attempts.get(request.attempt, 0))
    node.total += min(attempts.values()) - before
    known = node.done.get(request.attempt, 0)
    node.done[request.attempt] = max(request.rows, known)
    node.rows += node.done[request.attempt] - known
    if request.ended:
        node.asking.discard(request.attempt)
    else:
        node.asking.add(request.attempt)
