"""Prefixes that later calls of a query will need: several calls over the same fields, the one after the other.

A row of a call that is done marks the nodes of the prefix that later calls share with it, and takes back the mark that
the same row of the call before left. So a node knows how many rows will still come for it. Rows of a later call come
in the order in which the earlier call's rows were done: the mark that was left first is due first.

Rows may never come (a filter on the first answer drops them), so a mark is given up when it is twice as old as marks
were when they were due, counted in rows of the query. All marks of a query go with its last stream.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spark_llm.engine.request import Hints

if TYPE_CHECKING:
    from spark_llm.engine.cache.radix import Node

_MOST_STALE = 16  # marks of a node before those of queries that are over are looked for
_PATIENCE = 2  # times the age at which marks are due


@dataclass(slots=True, eq=False)
class Query:
    """What is known of a query with several calls; time is counted in its rows that are done.

    began: when the first row of a call (named by how many calls follow it) left marks. lag: the greatest age of a mark
    when it was due; 0 as long as no row of a later call has come.
    """

    streams: int = 0
    now: int = 0
    began: dict[int, int] = field(default_factory=dict)
    lag: int = 0
    over: bool = False

    def gives_up(self, mark: Mark) -> bool:
        """Whether the rows that ``mark`` counts are not expected any more."""
        return self.over or (self.lag > 0 and self.now - mark.latest > _PATIENCE * self.lag)


@dataclass(slots=True, eq=False)
class Mark:
    """``rows`` of one call were here and will come again. order: when the first of them was here, among all marks;

    latest: when the last one was, in rows of the query.
    """

    rows: int
    order: int
    latest: int

    def copy(self) -> Mark:
        """For the other half of a node that is split."""
        return Mark(self.rows, self.order, self.latest)


Marks = dict[tuple[Query, int], Mark]  # by query and number of calls that follow


class LaterCalls:
    """The marks of all queries; they themselves hang on the nodes, so there are no more than the cache holds."""

    def __init__(self) -> None:
        self._queries: dict[str, Query] = {}
        self._order = itertools.count()

    def open(self, name: str) -> None:
        """A stream of the query is open."""
        self._queries.setdefault(name, Query()).streams += 1

    def close(self, name: str) -> bool:
        """A stream of the query is closed; whether marks were given up with it, as it was the last one."""
        query = self._queries.get(name)
        if query is None:
            return False
        query.streams -= 1
        if query.streams > 0:
            return False
        query.over = True
        del self._queries[name]
        return bool(query.began)

    def done(self, node: Node, hints: Hints) -> None:
        """A row whose shared prefix ends at ``node`` is done."""
        query = self._queries.get(hints.query)
        if query is None:
            return
        query.now += 1
        level, above = hints.later_calls, (query, hints.later_calls + 1)
        if above[1] in query.began:
            mark = node.marks.get(above) if node.marks else None
            if mark is not None or not query.lag:
                query.lag = max(query.lag, query.now - (mark.latest if mark else query.began[above[1]]))
        if level:
            query.began.setdefault(level, query.now)
        step: Node | None = node
        while step is not None and step.parent is not None:
            self._take(step, above)
            if level:
                self._leave(step, query, level)
            step = step.parent

    def next_use(self, node: Node) -> int | None:
        """When rows of later calls come for ``node``, as a number that is the greater the later; None: never."""
        if not node.marks:
            return None
        for key, mark in list(node.marks.items()):
            if key[0].gives_up(mark):
                del node.marks[key]
        return min((mark.order for mark in node.marks.values()), default=None)

    @staticmethod
    def _take(node: Node, key: tuple[Query, int]) -> None:
        mark = node.marks.get(key) if node.marks else None
        if node.marks and mark is not None:
            mark.rows -= 1
            if not mark.rows:
                del node.marks[key]

    def _leave(self, node: Node, query: Query, level: int) -> None:
        if node.marks is None:
            node.marks = {}
        elif len(node.marks) > _MOST_STALE:  # of a prefix that every query uses, and that is never evicted
            node.marks = {key: mark for key, mark in node.marks.items() if not key[0].over}
        mark = node.marks.get((query, level))
        if mark is None:
            node.marks[query, level] = Mark(1, next(self._order), query.now)
        else:
            mark.rows += 1
            mark.latest = query.now
