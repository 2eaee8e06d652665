"""Joins the free list and the prefix index: the one place that hands out and takes back K/V pages."""

from __future__ import annotations

import numpy as np

from spark_llm.engine.cache.eviction import LeastRecentlyUsed, NeededLast
from spark_llm.engine.cache.pool import PagePool, Pages
from spark_llm.engine.cache.radix import RadixTree


class CacheManager:
    """``free + evictable + protected + held by running rows == total`` after every call (page counts).

    eviction: which prefixes go first; by default those that are not needed, or needed last.
    """

    def __init__(self, total_pages: int, page_size: int, eviction: LeastRecentlyUsed | None = None) -> None:
        self.page_size = page_size
        self.pool = PagePool(total_pages)
        self.eviction = eviction or NeededLast(page_size)
        self.tree = RadixTree(page_size, self.eviction)

    @property
    def available(self) -> int:
        """Pages that ``allocate`` could give: free ones and those of unlocked nodes."""
        return self.pool.free + self.tree.evictable

    def pages_for(self, tokens: int) -> int:
        """How many pages hold ``tokens`` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> Pages | None:
        """``count`` pages, evicting prefixes if need be; None if too few."""
        if count > self.available:
            return None
        if count > self.pool.free:
            self.pool.release(np.concatenate(self.tree.evict(count - self.pool.free)))
        return self.pool.allocate(count)

    def clear(self) -> None:
        """Evict all that is not locked."""
        for pages in self.tree.evict(self.tree.evictable):
            self.pool.release(pages)

    def rollback(self, step: int, keep: Pages) -> None:
        """Take a step's nodes out of the tree; their pages are free again, but for those in ``keep``."""
        freed = self.tree.rollback(step)
        if freed:
            self.pool.release(np.setdiff1d(np.concatenate(freed), keep))
