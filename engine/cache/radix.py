"""The prefix index: a radix tree over token ids whose nodes own K/V pages (RadixAttention, arXiv 2312.07104).

It knows tokens and page numbers, no tensors. Edges hold whole pages, so matches end on page borders. A node
enters the tree when the step that fills it is planned; ``rollback`` takes a step's nodes out again.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from spark_llm.engine.cache.pool import Pages
from spark_llm.engine.request import TokenIds

_EMPTY_TOKENS: TokenIds = np.empty(0, dtype=np.int32)
_EMPTY_PAGES: Pages = np.empty(0, dtype=np.int32)


class Node:
    """A run of tokens and the pages that hold their K/V.

    ``end``: tokens from the root to this node's end. ``locks``: running rows whose path goes through here.
    ``step``: the engine step that fills its pages.
    """

    __slots__ = ("children", "end", "last_use", "locks", "offered", "pages", "parent", "step", "tokens")

    def __init__(self, parent: Node | None, tokens: TokenIds, pages: Pages, step: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.step = step
        self.end: int = (parent.end if parent else 0) + len(tokens)
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.last_use = 0
        self.offered = False  # whether the heap of eviction candidates holds it


class RadixTree:
    """match, insert, lock, unlock, evict, rollback; eviction costs O(log leaves) a node."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(None, _EMPTY_TOKENS, _EMPTY_PAGES, step=-1)
        self.evictable = 0  # pages of nodes that nobody locks
        self.protected = 0  # pages of locked nodes
        self._clock = 0
        self._order = itertools.count()
        self._leaves: list[tuple[int, int, Node]] = []  # heap; stale entries are skipped when popped
        self._planned: dict[int, list[Node]] = {}  # step -> nodes that it fills, parents first

    def match(self, tokens: TokenIds, start: Node | None = None) -> tuple[Node, list[Pages]]:
        """The node where the longest cached prefix of ``tokens`` ends, splitting a run that fits in part.

        tokens: what follows ``start`` (the root by default). Returns that node and the pages on the way.
        """
        node = start or self.root
        size = self.page_size
        found: list[Pages] = []
        self._clock += 1
        at = 0
        while at + size <= len(tokens):
            child = node.children.get(tokens[at : at + size].tobytes())
            if child is None:
                break
            length = min(len(child.tokens), len(tokens) - at)
            differs = child.tokens[:length] != tokens[at : at + length]
            common = int(differs.argmax()) if differs.any() else length
            common -= common % size
            if common < len(child.tokens):
                child = self._split(child, common)
            child.last_use = self._clock
            found.append(child.pages)
            node = child
            at += common
        return node, found

    def insert(self, parent: Node, tokens: TokenIds, pages: Pages, step: int) -> Node | None:
        """A new node below ``parent``, unlocked; None (nothing changes) if its first page of tokens is there.

        The caller has matched before, so this happens only where a match had to stop before the prompt's end.
        """
        key = tokens[: self.page_size].tobytes()
        if key in parent.children:
            return None
        node = Node(parent, tokens, pages, step)
        self._clock += 1
        node.last_use = self._clock
        parent.children[key] = node
        self.evictable += len(pages)
        self._planned.setdefault(step, []).append(node)
        self._offer(node)
        return node

    def lock(self, node: Node) -> None:
        """Protect the path from the root to ``node``."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            if step.locks == 0:
                self.evictable -= len(step.pages)
                self.protected += len(step.pages)
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Undo one ``lock`` of the same node."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            if step.locks <= 0:
                raise ValueError("unlock of a node that is not locked")
            step.locks -= 1
            if step.locks == 0:
                self.evictable += len(step.pages)
                self.protected -= len(step.pages)
                self._offer(step)
            step = step.parent

    def evict(self, count: int) -> list[Pages]:
        """Remove unlocked leaves, least recently used first, until ``count`` pages are out."""
        freed: list[Pages] = []
        out = 0
        while out < count and self._leaves:
            last_use, _, node = heapq.heappop(self._leaves)
            node.offered = False
            if not self._is_candidate(node):
                continue
            if node.last_use != last_use:  # used since it was offered: back with its new age
                self._offer(node)
                continue
            freed.append(node.pages)
            out += len(node.pages)
            self._remove(node)
        return freed

    def commit(self, step: int) -> None:
        """The step's K/V are computed: its nodes stay."""
        self._planned.pop(step, None)

    def rollback(self, step: int) -> list[Pages]:
        """Remove the nodes that ``step`` should have filled; no row locks them any more."""
        freed: list[Pages] = []
        for node in reversed(self._planned.pop(step, [])):
            if node.locks or node.children:
                raise ValueError("rollback of a node that is in use")
            freed.append(node.pages)
            self._remove(node)
        return freed

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first."""
        todo = list(self.root.children.values())
        while todo:
            node = todo.pop()
            yield node
            todo.extend(node.children.values())

    def _split(self, node: Node, length: int) -> Node:
        """Cut ``node`` after ``length`` tokens; the upper part is new, the lower keeps its identity."""
        parent = node.parent
        assert parent is not None
        size = self.page_size
        upper = Node(parent, node.tokens[:length], node.pages[: length // size], node.step)
        upper.locks = node.locks
        upper.last_use = node.last_use
        parent.children[node.tokens[:size].tobytes()] = upper
        node.tokens = node.tokens[length:]
        node.pages = node.pages[length // size :]
        node.parent = upper
        upper.children[node.tokens[:size].tobytes()] = node
        if node.step in self._planned and node in (planned := self._planned[node.step]):
            planned.insert(planned.index(node), upper)
        return upper

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[: self.page_size].tobytes()]
        self.evictable -= len(node.pages)
        node.parent = None
        if self._is_candidate(parent):
            self._offer(parent)

    def _is_candidate(self, node: Node) -> bool:
        return node.locks == 0 and not node.children and node.parent is not None

    def _offer(self, node: Node) -> None:
        if not node.children and not node.offered:  # one entry a node: the heap never outgrows the tree
            node.offered = True
            heapq.heappush(self._leaves, (node.last_use, next(self._order), node))
