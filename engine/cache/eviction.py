"""Which prefix leaves the cache when pages run out: one that nobody is known to need, else the one needed last.

The rows to come are known better here than in an online service: those that wait hang in the order in which they will
be admitted, and streams say what will follow. So the cache can do what an optimal one does, evict what is used
farthest in the future (Belady, IBM Systems Journal 5(2), 1966), as far as that future is known, and is LRU beyond.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sortedcontainers import SortedList

from spark_llm.engine.cache.later import LaterCalls
from spark_llm.engine.prefix import KEY_BYTES, shared_tokens
from spark_llm.engine.request import Hints

if TYPE_CHECKING:
    from spark_llm.engine.cache.radix import Node

Use = tuple[int, bytes, int]  # when a waiting row will be admitted: the greater, the later
AT_ONCE: Use = (-1, b"", 0)
Rank = tuple[int | bytes, ...]  # among needed nodes: 1 and the mark's order, or 0 and a Use; the greatest goes first


class Upcoming(Protocol):
    """What eviction asks of the order in which waiting rows are admitted."""

    def next_use(self, path: bytes, beyond: int) -> tuple[int, Use] | None:
        """How many leading tokens of ``path`` (a sort key) a waiting row begins with, at most, and when it comes.

        None unless these are more than ``beyond``. Of several rows that begin with the whole path the one that is
        admitted first counts; when rows come that share only a part of it does not matter. O(log waiting + path).
        """


class Victim(NamedTuple):
    """A node to evict, but for what it holds of the first ``keep`` tokens of its path."""

    node: Node
    keep: int


class LeastRecentlyUsed:
    """The plain order, which knows nothing of what comes: the node used longest ago goes first."""

    def __init__(self) -> None:
        self._order = itertools.count()
        self._loose: list[tuple[int, int, Node]] = []  # heap by last use; stale entries are skipped when popped

    def offer(self, node: Node) -> None:
        """``node`` has become an unlocked leaf, or may have; it is judged when it is popped."""
        if not node.offered:  # one entry a node: the heap never outgrows the tree
            node.offered = True
            heapq.heappush(self._loose, (node.last_use, next(self._order), node))

    @property
    def kept(self) -> int:
        """How many nodes are kept aside because they are needed."""
        return 0

    def pop(self) -> Victim | None:
        """The unlocked leaf that is to go next; the caller removes it. None if there is none."""
        node = self._pop_loose()
        return Victim(node, 0) if node is not None else None

    def forget(self, node: Node) -> None:
        """``node`` has left the tree."""

    def follow(self, upcoming: Upcoming) -> None:
        """From now on ``upcoming`` tells which rows wait."""

    def open(self, stream: int, query: str) -> None:
        """A stream of rows of ``query`` begins."""

    def announce(self, key: bytes, hints: Hints) -> None:
        """A row with this sort key arrives. Hints of a stream that is not open are ignored."""

    def done(self, node: Node, hints: Hints) -> None:
        """A row is done; its prefix that later calls share ends at ``node``."""

    def close(self, stream: int) -> None:
        """A stream has ended: its hints are void."""

    def reconsider(self) -> None:
        """Rows that waited will not come."""

    def _pop_loose(self) -> Node | None:
        while self._loose:
            last_use, _, node = heapq.heappop(self._loose)
            node.offered = False
            if not node.is_free_leaf:
                continue
            if last_use == node.last_use:
                return node
            self.offer(node)  # used since it was offered: back with its new age
        return None


@dataclass(slots=True, eq=False)
class _Edge:
    """What the next row of a stream is taken to begin with; ``held`` are nodes that were kept for it."""

    key: bytes
    length: int
    held: dict[Node, None] = field(default_factory=dict)


class NeededLast(LeastRecentlyUsed):
    """Nodes that nobody is known to need go first, the one used longest ago before others.

    When only needed ones are left, those go first that later calls will need, marked last first; then those that
    waiting rows need, admitted last first. A needed node is judged once and then kept aside until it is used again or
    rows are cancelled, so that what an eviction costs does not grow with what is needed.
    """

    def __init__(self, page_size: int) -> None:
        super().__init__()
        self._page_size = page_size
        self._upcoming: Upcoming | None = None
        self._kept: SortedList[tuple[Rank, int, Node]] = SortedList()  # needed last at the end
        self._streams: dict[int, str] = {}
        self._edges: dict[int, _Edge] = {}
        self._later = LaterCalls()
        self._stale = False

    @property
    def kept(self) -> int:
        return len(self._kept)

    def offer(self, node: Node) -> None:
        self.forget(node)
        super().offer(node)

    def forget(self, node: Node) -> None:
        if node.entry is not None:
            self._kept.remove(node.entry)
            node.entry = None

    def pop(self) -> Victim | None:
        if self._stale:
            self._stale = False
            for _, _, node in list(self._kept):
                self.offer(node)
        while True:
            while (node := self._pop_loose()) is not None:
                keep, use = self._need(node)
                if use is None:
                    return Victim(node, keep)
                self._keep(node, use)
            if not self._kept:
                return None
            if self._release_first_mark():
                continue
            judged, _, node = self._kept.pop()
            node.entry = None
            if node.is_free_leaf:
                keep, use = self._need(node)
                if use == judged:
                    return Victim(node, keep)
                self.offer(node)

    def follow(self, upcoming: Upcoming) -> None:
        self._upcoming = upcoming

    def open(self, stream: int, query: str) -> None:
        self._streams[stream] = query
        if query:
            self._later.open(query)

    def announce(self, key: bytes, hints: Hints) -> None:
        self._drop_edge(hints.stream)
        if hints.shared_next and hints.stream in self._streams:
            self._edges[hints.stream] = _Edge(key, hints.shared_next)

    def done(self, node: Node, hints: Hints) -> None:
        self._later.done(node, hints)

    def close(self, stream: int) -> None:
        self._drop_edge(stream)
        if self._later.close(self._streams.pop(stream, "")):
            self._stale = True

    def reconsider(self) -> None:
        self._stale = True

    def _keep(self, node: Node, use: Rank) -> None:
        node.entry = (use, next(self._order), node)
        self._kept.add(node.entry)

    def _release_first_mark(self) -> bool:
        """Let the node be judged anew that was marked first, if that mark is given up, as first marks are first."""
        at = self._kept.bisect_left(((1,),))
        if at == len(self._kept):
            return False
        judged, _, node = self._kept[at]
        if node.is_free_leaf and self._need(node)[1] == judged:
            return False
        self.offer(node)
        return True

    def _drop_edge(self, stream: int) -> None:
        edge = self._edges.pop(stream, None)
        for node in edge.held if edge else ():
            if node.entry is not None:
                self.offer(node)

    def _need(self, node: Node) -> tuple[int, Rank | None]:
        """When the whole node is needed (None: never), and if not soon, how many tokens of its path are."""
        assert node.parent is not None
        path, beyond = node.path, node.parent.end + self._page_size - 1  # less than a page cannot be kept
        waiting = self._upcoming.next_use(path, beyond) if self._upcoming is not None else None
        needed, use = waiting if waiting is not None else (0, AT_ONCE)
        start = path[: KEY_BYTES * (beyond + 1)]
        for edge in self._edges.values():
            if edge.length > beyond and edge.key.startswith(start):
                length = min(edge.length, shared_tokens(edge.key, path))
                if length >= node.end:
                    use = AT_ONCE
                    edge.held[node] = None
                needed = max(needed, length)
        if needed >= node.end:
            return 0, (0, *use)
        order = self._later.next_use(node)
        return needed - needed % self._page_size, None if order is None else (1, order)
