"""The free list hands each page out once and refuses to take it back twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.pool import PagePool


@given(st.lists(st.integers(0, 6), max_size=40), st.randoms(use_true_random=False))
def test_pages_are_owned_once(sizes: list[int], random: object) -> None:
    pool = PagePool(16)
    owned: list[np.ndarray] = []
    for size in sizes:
        if size <= pool.free:
            owned.append(pool.allocate(size))
        elif owned:
            pool.release(owned.pop(random.randrange(len(owned))))  # type: ignore[attr-defined]
        pages = [int(page) for run in owned for page in run]
        assert len(set(pages)) == len(pages) == pool.total - pool.free
        assert not pool.is_free(np.array(pages, dtype=np.int32)).any()
    for run in owned:
        pool.release(run)
    assert sorted(pool.allocate(16).tolist()) == list(range(16))


def test_pages_freed_last_are_used_first() -> None:
    pool = PagePool(8)
    first, second = pool.allocate(3), pool.allocate(3)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(3).tolist() == first.tolist()


def test_too_many_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="3 free"):
        PagePool(3).allocate(4)


@pytest.mark.parametrize("pages", [[1, 1], [0], [1, 0]])
def test_a_page_given_back_twice_is_refused_and_nothing_changes(pages: list[int]) -> None:
    pool = PagePool(4)
    taken = pool.allocate(3)
    pool.release(taken[:1])
    with pytest.raises(ValueError, match="freed twice"):
        pool.release(np.array(pages, dtype=np.int32))
    assert pool.free == 2
    assert pool.is_free(np.arange(4, dtype=np.int32)).tolist() == [True, False, False, True]


def test_allocate_evicts_only_what_it_lacks_and_gives_none_when_too_few_are_left() -> None:
    cache = CacheManager(6, page_size=2)
    pages = cache.allocate(4)
    assert pages is not None
    first = cache.tree.insert(cache.tree.root, np.array([1, 2, 3, 4], np.int32), pages[:2], step=0)
    cache.tree.insert(cache.tree.root, np.array([5, 6, 7, 8], np.int32), pages[2:], step=0)
    cache.tree.commit(0)
    assert first is not None
    cache.tree.lock(first)
    assert cache.available == 4
    assert cache.allocate(5) is None
    assert cache.tree.evictable == 2
    more = cache.allocate(3)
    assert more is not None
    assert len(more) == 3
    assert (cache.tree.evictable, cache.tree.protected, cache.pool.free) == (0, 2, 1)


@pytest.mark.parametrize(("size", "tokens", "pages"), [(1, 5, 5), (4, 0, 0), (4, 1, 1), (4, 4, 1), (4, 5, 2)])
def test_pages_for(size: int, tokens: int, pages: int) -> None:
    assert CacheManager(1, size).pages_for(tokens) == pages
