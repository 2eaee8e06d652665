"""The engine's conservation laws as one check, for tests and (under a flag) every step at run time."""

from __future__ import annotations

import numpy as np

from spark_llm.engine.cache.radix import Node
from spark_llm.engine.prefix import KEY_BYTES, sort_key
from spark_llm.engine.scheduling.scheduler import Scheduler


def validate_invariants(scheduler: Scheduler) -> None:
    """AssertionError if a page is lost, owned twice, or counted wrongly, if a lock has no row, or a leaf no place.

    ``free + evictable + protected + held by running rows == total``, whatever is in flight.
    """
    cache, in_flight = scheduler.cache, scheduler.in_flight
    owners = np.zeros(cache.pool.total, dtype=np.int32)
    evictable = protected = held = kept = 0
    expected_locks: dict[int, int] = {}
    for plan in in_flight:
        for node in plan.held:
            _expect_locks(node, expected_locks)
    for row in scheduler.running:
        private = row.pages[row.tree_pages : row.num_pages]
        owners[private] += 1
        held += len(private)
        assert row.tree_pages * cache.page_size == row.node.end, "a row's node and pages end apart"
        assert row.num_pages >= cache.pages_for(row.num_computed), "computed tokens without pages"
        path = row.node
        at = row.tree_pages
        _expect_locks(path, expected_locks)
        while path.parent is not None:
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
    _validate_lanes(scheduler)
    _validate_accounts(scheduler)


def _expect_locks(node: Node, locks: dict[int, int]) -> None:
    path = node
    while path.parent is not None:
        locks[id(path)] = locks.get(id(path), 0) + 1
        path = path.parent


def _validate_lanes(scheduler: Scheduler) -> None:
    """AssertionError if lanes and rows disagree, or if a lane is further ahead than steps are in flight."""
    lanes, running = scheduler.lanes, scheduler.running
    assert lanes.free + len(running) == lanes.count, "lanes are lost"
    assert sorted(row.lane for row in running) == [i for i, row in enumerate(lanes.rows) if row is not None]
    decoding = lanes.decoding.tolist()
    assert len(set(decoding)) == len(decoding), "a lane decodes twice"
    assert lanes.decodes[decoding].all(), "a lane decodes whose row does not"
    assert (lanes.told <= lanes.num_pages).all(), "a page was told that is not there"
    owned = {lane for plan in scheduler.in_flight for lane in (*plan.sampling.tolist(), *plan.decode.tolist())}
    for row in running:
        lane = row.lane
        assert lanes.rows[lane] is row, "a row's lane is another row's"
        assert int(lanes.num_pages[lane]) == row.num_pages, "a lane's pages miscounted"
        assert row.num_tokens == int(lanes.known[lane]) == row.num_prompt + len(row.output), "answers miscounted"
        assert len(row.tokens) == row.num_tokens, "tokens miscounted"
        assert row.num_tokens < row.limit, "a row that is done runs"
        ahead = row.num_computed + 1 - row.num_tokens  # tokens in flight
        assert ahead <= len(scheduler.in_flight), "a row is ahead of its answer"
        if lanes.decodes[lane]:
            assert ahead >= 0, "a row decodes that lacks tokens"
            assert ahead == 0 or lane in owned, "a row's token is not in flight"
            assert lane in decoding or row.num_computed + 1 == row.limit, "a row that decodes is not planned"


def _validate_accounts(scheduler: Scheduler) -> None:
    """AssertionError if a client's rows are miscounted, or one without rows is kept for longer than steps need it."""
    users, running = scheduler.accounts.users, len(scheduler.running)
    for user in users.values():
        assert user.rows == sum(query.rows for query in user.queries.values()), "a user's rows miscounted"
        assert user.running == sum(query.running for query in user.queries.values()), "a user's running rows miscounted"
        assert user.rows or scheduler.in_flight, "a user is kept that has no rows"
    assert sum(user.rows for user in users.values()) == len(scheduler), "rows without a client"
    assert sum(user.running for user in users.values()) == running, "running rows without a client"
    assert len(scheduler.waiting) + running == len(scheduler), "waiting rows miscounted"
