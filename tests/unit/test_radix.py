"""Single behaviours of the radix tree that the state machine does not name."""

from __future__ import annotations

import numpy as np
import pytest

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.radix import Node, RadixTree


def tokens(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def put(tree: RadixTree, row: np.ndarray, first_page: int, step: int = 0) -> Node:
    """Insert all whole pages of ``row`` that are not there yet, and commit."""
    node, found = tree.match(row)
    known = sum(len(run) for run in found)
    rest = row[node.end : len(row) - len(row) % tree.page_size]
    pages = np.arange(first_page, first_page + len(rest) // tree.page_size, dtype=np.int32)
    new = tree.insert(node, rest, pages, step) if len(pages) else node
    tree.commit(step)
    assert new is not None
    assert known * tree.page_size == node.end
    return new


def test_a_partial_match_splits_the_run_and_keeps_the_lower_node() -> None:
    tree = RadixTree(page_size=1)
    node = put(tree, tokens(1, 2, 3, 4), first_page=10)
    upper, found = tree.match(tokens(1, 2, 9))
    assert [run.tolist() for run in found] == [[10, 11]]
    assert node.parent is upper
    assert (upper.end, node.end) == (2, 4)
    assert node.pages.tolist() == [12, 13]


def test_a_match_ends_on_a_page_border() -> None:
    tree = RadixTree(page_size=4)
    put(tree, tokens(*range(8)), first_page=0)
    for shared in range(8):
        node, _ = tree.match(tokens(*range(shared), 99, 99, 99, 99, 99))
        assert node.end == shared - shared % 4
    assert tree.match(tokens(*range(8)))[0].end == 8


def test_runs_that_differ_inside_their_first_page_are_siblings() -> None:
    tree = RadixTree(page_size=4)
    put(tree, tokens(1, 2, 3, 4), first_page=0)
    put(tree, tokens(1, 2, 3, 5), first_page=1)
    assert len(tree.root.children) == 2


def test_an_insert_of_what_is_there_changes_nothing() -> None:
    tree = RadixTree(page_size=1)
    put(tree, tokens(1, 2), first_page=0)
    assert tree.insert(tree.root, tokens(1, 2, 3), tokens(7, 8, 9), step=1) is None
    assert tree.evictable == 2
    assert [node.pages.tolist() for node in tree.nodes()] == [[0, 1]]


def test_the_least_recently_used_leaf_goes_first_then_its_parent() -> None:
    tree = RadixTree(page_size=1)
    put(tree, tokens(1, 1), first_page=0)
    put(tree, tokens(1, 2), first_page=2)
    put(tree, tokens(5, 6), first_page=4)
    tree.match(tokens(1, 1))
    order = [run.tolist() for run in tree.evict(99)]
    assert order == [[2], [4, 5], [1], [0]]
    assert not tree.root.children


def test_a_locked_path_stays_and_goes_after_unlock() -> None:
    tree = RadixTree(page_size=1)
    node = put(tree, tokens(1, 2, 3), first_page=0)
    tree.lock(node)
    assert tree.evict(99) == []
    assert (tree.evictable, tree.protected) == (0, 3)
    upper, _ = tree.match(tokens(1))  # the split keeps both halves locked
    assert upper.locks == node.locks == 1
    assert tree.evict(99) == []
    tree.unlock(node)
    assert [run.tolist() for run in tree.evict(99)] == [[1, 2], [0]]


def test_unlocking_twice_is_refused() -> None:
    tree = RadixTree(page_size=1)
    node = put(tree, tokens(1), first_page=0)
    tree.lock(node)
    tree.unlock(node)
    with pytest.raises(ValueError, match="not locked"):
        tree.unlock(node)


def test_rollback_takes_only_its_step_and_halves_of_split_nodes() -> None:
    cache = CacheManager(8, page_size=1)
    pages = cache.pool.allocate(5)
    old = cache.tree.insert(cache.tree.root, tokens(1), pages[:1], step=1)
    cache.tree.commit(1)
    assert old is not None
    cache.tree.insert(old, tokens(2, 3, 4, 5), pages[1:], step=2)
    cache.tree.match(tokens(1, 2, 3, 9))
    assert len(list(cache.tree.nodes())) == 3
    cache.rollback(2, keep=pages[3:4])
    assert [node.tokens.tolist() for node in cache.tree.nodes()] == [[1]]
    assert cache.pool.free == 3 + 3
    assert not cache.pool.is_free(pages[3:4]).any()


def test_rollback_of_a_node_in_use_is_refused() -> None:
    tree = RadixTree(page_size=1)
    node = tree.insert(tree.root, tokens(1), tokens(0), step=1)
    assert node is not None
    tree.lock(node)
    with pytest.raises(ValueError, match="in use"):
        tree.rollback(1)


def test_a_committed_step_is_not_rolled_back() -> None:
    tree = RadixTree(page_size=1)
    put(tree, tokens(1, 2), first_page=0, step=1)
    assert tree.rollback(1) == []
    assert tree.match(tokens(1, 2))[0].end == 2


@pytest.mark.parametrize("leaves", [100, 10_000])
def test_evicting_one_leaf_looks_at_a_bounded_number_of_nodes(leaves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when every leaf was used or locked since it was offered: the heap holds one entry a node."""
    tree = RadixTree(page_size=1)
    rows = [tokens(i, i) for i in range(leaves)]
    for i, row in enumerate(rows):
        put(tree, row, first_page=2 * i)
    for _ in range(3):
        for row in rows:
            node, _ = tree.match(row)
            tree.lock(node)
            tree.unlock(node)
    assert len(tree.eviction._loose) == leaves
    looks = 0
    is_free_leaf = Node.is_free_leaf

    def counting(node: Node) -> bool:
        nonlocal looks
        looks += 1
        return is_free_leaf.__get__(node)  # type: ignore[no-any-return]

    monkeypatch.setattr(Node, "is_free_leaf", property(counting))
    freed = [tree.evict(2) for _ in range(leaves)]
    assert [len(runs) for runs in freed] == [1] * leaves
    assert looks <= 4 * leaves
