"""The engine's conservation laws as one pure check, for tests and (under a flag) every step at run time."""

from __future__ import annotations

import numpy as np

from spark_llm.engine.prefix import KEY_BYTES, sort_key
from spark_llm.engine.scheduling.scheduler import Scheduler


def validate_invariants(scheduler: Scheduler) -> None:
    """AssertionError if a page is lost, owned twice, or counted wrongly, if a lock has no row, or a leaf no place.

    ``free + evictable + protected + held by running rows == total``.
    """
    cache = scheduler.cache
    owners = np.zeros(cache.pool.total, dtype=np.int32)
    evictable = protected = held = kept = 0
    expected_locks: dict[int, int] = {}
    for row in scheduler.running:
        private = row.pages[row.tree_pages : row.num_pages]
        owners[private] += 1
        held += len(private)
        assert row.tree_pages * cache.page_size == row.node.end, "a row's node and pages end apart"
        assert row.num_pages >= cache.pages_for(row.num_computed), "computed tokens without pages"
        path = row.node
        at = row.tree_pages
        while path.parent is not None:
            expected_locks[id(path)] = expected_locks.get(id(path), 0) + 1
            at -= len(path.pages)
            assert (row.pages[at : at + len(path.pages)] == path.pages).all(), "pages differ from the path's"
            path = path.parent
        assert at == 0, "a row's path has another length than its pages"
    for node in cache.tree.nodes():
        owners[node.pages] += 1
        assert len(node.tokens) == len(node.pages) * cache.page_size, "a node's tokens and pages differ"
        assert node.parent is not None
        assert node.end == node.parent.end + len(node.tokens), "a node ends elsewhere than its path"
        assert node.locks == expected_locks.get(id(node), 0), "locks without rows, or rows without locks"
        assert node.key.startswith(node.parent.path), "a node's key is that of another path"
        assert node.path[KEY_BYTES * node.parent.end :] == sort_key(node.tokens), "a node's key is not its tokens"
        assert not (node.offered and node.entry), "eviction holds a node twice"
        if node.is_free_leaf:
            assert node.offered or node.entry, "an unlocked leaf that eviction does not know"
        kept += node.entry is not None
        assert all(mark.rows > 0 for mark in (node.marks or {}).values()), "a mark without rows"
        if node.locks:
            protected += len(node.pages)
        else:
            evictable += len(node.pages)
    assert kept == cache.eviction.kept, "eviction keeps nodes that the tree has not"
    assert evictable == cache.tree.evictable, "evictable pages miscounted"
    assert protected == cache.tree.protected, "protected pages miscounted"
    free = cache.pool.free
    assert free + evictable + protected + held == cache.pool.total, "pages are not conserved"
    assert owners.max(initial=0) <= 1, "a page has two owners"
    assert (cache.pool.is_free(np.arange(cache.pool.total, dtype=np.int32)) == (owners == 0)).all(), (
        "the free list and the owners disagree"
    )
