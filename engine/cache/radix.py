"""The prefix index: a radix tree over token ids whose nodes own K/V pages (RadixAttention, arXiv 2312.07104).

It knows tokens and page numbers, no tensors. Edges hold whole pages, so matches end on page borders. A node
enters the tree when the step that fills it is planned; ``rollback`` takes a step's nodes out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from spark_llm.engine.cache.eviction import LeastRecentlyUsed, Rank
from spark_llm.engine.cache.later import Marks
from spark_llm.engine.cache.pool import Pages
from spark_llm.engine.prefix import KEY_BYTES, common_tokens, sort_key
from spark_llm.engine.request import TokenIds

_EMPTY_TOKENS: TokenIds = np.empty(0, dtype=np.int32)
_EMPTY_PAGES: Pages = np.empty(0, dtype=np.int32)


class Node:
    """A run of tokens and the pages that hold their K/V.

    ``end``: tokens from the root to this node's end. ``locks``: running rows whose path goes through here.
    ``step``: the engine step that fills its pages. ``key``: the sort key of some prompt that runs through here.
    """

    __slots__ = (
        "children",
        "end",
        "entry",
        "key",
        "last_use",
        "locks",
        "marks",
        "offered",
        "pages",
        "parent",
        "step",
        "tokens",
    )

    def __init__(self, parent: Node | None, tokens: TokenIds, pages: Pages, step: int, key: bytes) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.step = step
        self.end: int = (parent.end if parent else 0) + len(tokens)
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.key = key
        self.last_use = 0
        # what eviction knows of it; see eviction.py and later.py
        self.offered = False
        self.entry: tuple[Rank, int, Node] | None = None
        self.marks: Marks | None = None

    @property
    def path(self) -> bytes:
        """The sort key of the tokens from the root to this node's end; not a copy where a prompt ends here."""
        return self.key[: KEY_BYTES * self.end]

    @property
    def is_free_leaf(self) -> bool:
        """Whether it may be evicted."""
        return self.locks == 0 and not self.children and self.parent is not None


class RadixTree:
    """match, insert, lock, unlock, evict, rollback. ``eviction`` says which unlocked leaf goes next.

    on_evict: told of each run that is evicted: the sort key of a prompt through it, its start and end there.
    """

    def __init__(self, page_size: int, eviction: LeastRecentlyUsed | None = None) -> None:
        self.page_size = page_size
        self.eviction = eviction or LeastRecentlyUsed()
        self.root = Node(None, _EMPTY_TOKENS, _EMPTY_PAGES, step=-1, key=b"")
        self.evictable = 0  # pages of nodes that nobody locks
        self.protected = 0  # pages of locked nodes
        self.on_evict: Callable[[bytes, int, int], None] | None = None
        self._clock = 0
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
            common = common_tokens(child.tokens, tokens[at:])
            common -= common % size
            if common < len(child.tokens):
                child = self._split(child, common)
            child.last_use = self._clock
            found.append(child.pages)
            node = child
            at += common
        return node, found

    def insert(self, parent: Node, tokens: TokenIds, pages: Pages, step: int, key: bytes | None = None) -> Node | None:
        """A new node below ``parent``, unlocked; None (nothing changes) if its first page of tokens is there.

        The caller has matched before, so this happens only where a match had to stop before the prompt's end.
        key: the prompt's sort key, to be kept instead of a copy of the part that is inserted.
        """
        first = tokens[: self.page_size].tobytes()
        if first in parent.children:
            return None
        node = Node(parent, tokens, pages, step, parent.path + sort_key(tokens) if key is None else key)
        self._clock += 1
        node.last_use = self._clock
        parent.children[first] = node
        self.evictable += len(pages)
        self._planned.setdefault(step, []).append(node)
        self.eviction.offer(node)
        return node

    def lock(self, node: Node, above: Node | None = None) -> None:
        """Protect the path from the root to ``node``; what lies above ``above``, and that node itself, already is."""
        step: Node | None = node
        while step is not above and step is not None and step.parent is not None:
            if step.locks == 0:
                self.evictable -= len(step.pages)
                self.protected += len(step.pages)
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node, above: Node | None = None) -> None:
        """Undo one ``lock`` of the same nodes."""
        step: Node | None = node
        while step is not above and step is not None and step.parent is not None:
            if step.locks <= 0:
                raise ValueError("unlock of a node that is not locked")
            step.locks -= 1
            if step.locks == 0:
                self.evictable += len(step.pages)
                self.protected -= len(step.pages)
                if not step.children:
                    self.eviction.offer(step)
            step = step.parent

    def evict(self, count: int) -> list[Pages]:
        """Remove unlocked leaves, or what is not to be kept of them, until ``count`` pages are out."""
        freed: list[Pages] = []
        out = 0
        while out < count and (victim := self.eviction.pop()) is not None:
            node = victim.node
            assert node.parent is not None
            if victim.keep > node.parent.end:
                self._split(node, victim.keep - node.parent.end)
            freed.append(node.pages)
            out += len(node.pages)
            if self.on_evict is not None:
                self.on_evict(node.key, node.parent.end, node.end)
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
        upper = Node(parent, node.tokens[:length], node.pages[: length // size], node.step, node.key)
        upper.locks = node.locks
        upper.last_use = node.last_use
        if node.marks:
            upper.marks = {key: mark.copy() for key, mark in node.marks.items()}
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
        self.eviction.forget(node)
        if parent.is_free_leaf:
            self.eviction.offer(parent)
