"""A state machine drives the radix tree and the page pool against a plain dict of prefixes.

The model: every whole-page prefix that is cached, and the page of its last tokens. A two-letter alphabet makes
splits and partial matches the rule. With eviction by need, rows wait and later calls are announced, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from spark_llm.engine.cache.eviction import LeastRecentlyUsed, NeededLast
from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.radix import Node
from spark_llm.engine.request import Hints, Request, SamplingParams
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

Prefix = tuple[int, ...]
TOTAL_PAGES = 24


@dataclass(eq=False)
class Holder:
    """What a running row holds: a lock on ``node`` (the end of ``prefix``) and full private pages behind it."""

    tokens: Prefix
    node: Node
    prefix: Prefix
    private: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Undo:
    """How the holder was before the open step touched it."""

    holder: Holder
    node: Node
    prefix: Prefix
    private: list[int]
    admitted: bool


def array(tokens: Prefix | list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


class RadixMachine(RuleBasedStateMachine):
    """Rows come, share, grow and go; steps are committed or rolled back; pages run out."""

    page_size = 1
    by_need = False

    def __init__(self) -> None:
        super().__init__()
        self.eviction = NeededLast(self.page_size) if self.by_need else LeastRecentlyUsed()
        self.cache = CacheManager(TOTAL_PAGES, self.page_size, self.eviction)
        self.waiting = LongestPrefixFirst()
        self.rows: list[Row] = []  # that wait
        self.marked: set[Prefix] = set()  # that a later call will need
        self.eviction.follow(self.waiting)
        self.eviction.open(0, "query")
        self.sequence = 0
        self.cached: dict[Prefix, int] = {}  # the model: whole-page prefix -> page of its last tokens
        self.holders: list[Holder] = []
        self.locks: list[tuple[Node, Prefix]] = []  # taken by the lock rule alone
        self.step = 0
        self.planned: list[Prefix] = []  # whole-page prefixes that the open step adds
        self.undo: list[Undo] = []  # of the open step, in order

    # --- the model's side

    def prefixes(self, tokens: Prefix) -> list[Prefix]:
        size = self.page_size
        return [tokens[:end] for end in range(size, len(tokens) + 1, size)]

    def longest(self, tokens: Prefix) -> list[Prefix]:
        """The cached whole-page prefixes of ``tokens``, shortest first."""
        found = []
        for prefix in self.prefixes(tokens):
            if prefix not in self.cached:
                break
            found.append(prefix)
        return found

    def protected(self) -> set[Prefix]:
        ends = [h.prefix for h in self.holders] + [prefix for _, prefix in self.locks]
        return {prefix for end in ends for prefix in self.prefixes(end)}

    def forget(self, pages: list[np.ndarray]) -> None:
        """The tree gave ``pages`` up: check that it might, and drop them from the model."""
        gone = {int(page) for run in pages for page in run}
        prefixes = {prefix for prefix, page in self.cached.items() if page in gone}
        assert len(prefixes) == len(gone), "a page is freed that no prefix had"
        assert not prefixes & self.protected(), "a locked prefix was evicted"
        for prefix in prefixes:
            del self.cached[prefix]
        if self.by_need:
            left = set(self.cached) - self.protected()
            needed = {prefix for row in self.rows for prefix in self.prefixes(tuple(row.request.prompt.tolist()))}
            if prefixes & needed:
                assert left <= needed, "a needed prefix was evicted before one that no waiting row needs"
            elif prefixes & self.marked:
                assert left <= needed | self.marked, "a needed prefix was evicted before one that nobody needs"
        self.marked -= prefixes
        orphans = [prefix for prefix in self.cached if len(self.longest(prefix)) * self.page_size < len(prefix)]
        assert not orphans, "a prefix was evicted before its continuation"

    def candidates(self) -> list[Node]:
        return [node for node in self.cache.tree.nodes() if not node.locks and not node.children]

    # --- operations

    def match(self, tokens: Prefix, start: Holder | None = None) -> tuple[Node, Prefix]:
        """match() from the root or from where a holder stands, checked against the model."""
        at = len(start.prefix) if start else 0
        expected = self.longest(tokens)
        node, found = self.cache.tree.match(array(tokens[at:]), start.node if start else None)
        pages = [int(page) for run in found for page in run]
        assert pages == [self.cached[prefix] for prefix in expected if len(prefix) > at]
        end = expected[-1] if expected else ()
        assert node.end == max(len(end), at)
        return node, tokens[: node.end]

    def move(self, holder: Holder, node: Node, prefix: Prefix) -> None:
        self.cache.tree.lock(node)
        self.cache.tree.unlock(holder.node)
        holder.node, holder.prefix = node, prefix

    def allocate(self, count: int) -> list[int] | None:
        available, free = self.cache.available, self.cache.pool.free
        evictable = len(set(self.cached) - self.protected())
        assert available == free + evictable
        oldest = min((node.last_use for node in self.candidates()), default=None)
        freed: list[np.ndarray] = []
        evict = self.cache.tree.evict

        def recording(pages: int) -> list[np.ndarray]:
            ages.extend(node.last_use for node in self.candidates())
            freed.extend(evict(pages))
            return freed

        ages: list[int] = []
        self.cache.tree.evict = recording  # type: ignore[method-assign]
        pages = self.cache.allocate(count)
        del self.cache.tree.evict  # type: ignore[method-assign]
        if pages is None:
            assert count > available
            assert not freed
            return None
        assert len(pages) == len(set(pages.tolist())) == count
        self.forget(freed)
        assert (count > free) == bool(freed)
        if freed:
            assert self.by_need or min(ages) == oldest
            out = sum(len(run) for run in freed)
            assert out - len(freed[-1]) < count - free <= out, "more was evicted than needed"
        assert not set(pages.tolist()) & set(self.cached.values())
        return [int(page) for page in pages]

    def release(self, holder: Holder) -> None:
        self.cache.pool.release(array(holder.private))
        self.cache.tree.unlock(holder.node)
        self.holders.remove(holder)

    # --- rules

    @rule(tokens=st.lists(st.integers(0, 1), max_size=40))
    def look_up(self, tokens: list[int]) -> None:
        self.match(tuple(tokens))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=40),
        share=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 40)),
        computed=st.integers(0, 40),
        index=st.booleans(),
    )
    def admit(self, tokens: list[int], share: tuple[int, int] | None, computed: int, index: bool) -> None:
        """A row comes: it adopts what is cached, and gets pages for some of its further tokens."""
        if share is not None and self.cached:  # continue a cached prefix, so that long ones match too
            known = sorted(self.cached)[share[0] % len(self.cached)]
            tokens = [*known[: share[1]], *tokens]
        row = tuple(tokens)
        node, prefix = self.match(row)
        holder = Holder(row, node, prefix)
        self.cache.tree.lock(node)
        self.holders.append(holder)
        self.undo.append(Undo(holder, self.cache.tree.root, (), [], admitted=True))
        wanted = (min(len(row), len(prefix) + computed) - len(prefix)) // self.page_size
        pages = self.allocate(wanted)
        if pages is None:
            self.undo.pop()
            self.release(holder)
            return
        holder.private = pages
        if index:
            self.index(holder)

    @precondition(lambda self: not self.undo)
    @rule(
        rows=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=20), min_size=1, max_size=6),
        share=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 40)),
    )
    def answer(self, rows: list[list[int]], share: tuple[int, int] | None) -> None:
        """Rows come, are computed and go, one a step: what fills a cache."""
        for tokens in rows:
            before = len(self.holders)
            self.admit(tokens, share, computed=40, index=True)
            self.commit()
            if len(self.holders) > before:
                self.release(self.holders[-1])

    @rule(part=st.floats(0, 1))
    def squeeze(self, part: float) -> None:
        """Pages are needed for a while."""
        pages = self.allocate(int(self.cache.available * part))
        self.cache.pool.release(array(pages or []))

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99), count=st.integers(0, 5), index=st.booleans())
    def grow(self, which: int, count: int, index: bool) -> None:
        """A running row adopts what appeared meanwhile, or computes further pages; they enter the tree or not."""
        holder = self.holders[which % len(self.holders)]
        self.undo.append(Undo(holder, holder.node, holder.prefix, list(holder.private), admitted=False))
        if not holder.private:
            node, prefix = self.match(holder.tokens, holder)
            if node is not holder.node:
                self.move(holder, node, prefix)
        room = len(holder.tokens) // self.page_size - len(holder.prefix) // self.page_size - len(holder.private)
        pages = self.allocate(min(count, room))
        holder.private += pages or []
        if index:
            self.index(holder)

    def index(self, holder: Holder) -> None:
        """insert() of the holder's private pages, checked against the model."""
        if not holder.private:
            return
        start, stop = len(holder.prefix), len(holder.prefix) + len(holder.private) * self.page_size
        known = self.prefixes(holder.tokens)[start // self.page_size] in self.cached
        node = self.cache.tree.insert(
            holder.node, array(holder.tokens[start:stop]), array(holder.private), step=self.step
        )
        assert (node is None) == known
        if node is None:
            return
        for prefix, page in zip(
            self.prefixes(holder.tokens[:stop])[start // self.page_size :], holder.private, strict=True
        ):
            assert prefix not in self.cached
            self.cached[prefix] = page
            self.planned.append(prefix)
        holder.private = []
        self.move(holder, node, holder.tokens[:stop])

    @precondition(lambda self: not self.undo)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        """A row ends or is cancelled between steps."""
        if self.holders:
            self.release(self.holders[which % len(self.holders)])

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        share=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 40)),
    )
    def wait(self, tokens: list[int], share: tuple[int, int] | None) -> None:
        """A row arrives that may need what is cached."""
        if share is not None and self.cached:
            known = sorted(self.cached)[share[0] % len(self.cached)]
            tokens = [*known[: share[1]], *tokens]
        tokens = tokens[:40]
        request = Request(self.sequence, array(tokens), SamplingParams(max_tokens=1))
        row = Row(request, self.sequence, self.cache.tree.root)
        self.sequence += 1
        self.waiting.push(row)
        self.rows.append(row)

    @precondition(lambda self: self.rows)
    @rule(cancelled=st.none() | st.integers(0, 99), returns=st.booleans())
    def stop_waiting(self, cancelled: int | None, returns: bool) -> None:
        """A row is admitted, and may come back, or it is cancelled."""
        if cancelled is None:
            row = self.waiting.peek()
            assert row is not None
            self.waiting.take(row)
            node, _ = self.match(tuple(row.request.prompt.tolist()))
            self.cache.tree.lock(node)
            self.cache.tree.unlock(node)
            if returns:
                self.waiting.push_back(row)
                return
        else:
            row = self.rows[cancelled % len(self.rows)]
            self.waiting.remove(row)
            self.eviction.reconsider()
        self.rows.remove(row)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=30))
    def announce_later_call(self, tokens: list[int]) -> None:
        """A row is done that a later call will need."""
        node, prefix = self.match(tuple(tokens))
        self.cache.tree.lock(node)
        self.eviction.done(node, Hints(0, "query", later_calls=1, shared_tokens=len(tokens)))
        self.cache.tree.unlock(node)
        self.marked |= set(self.prefixes(prefix))

    @precondition(lambda self: self.marked)
    @rule()
    def end_query(self) -> None:
        self.eviction.close(0)
        self.eviction.open(0, "query")
        self.marked.clear()

    @rule(tokens=st.lists(st.integers(0, 1), max_size=20))
    def lock(self, tokens: list[int]) -> None:
        """Someone holds a committed prefix for longer."""
        end = self.longest(tuple(tokens))
        while end and end[-1] in self.planned:
            end.pop()
        node, prefix = self.match(end[-1] if end else ())
        self.cache.tree.lock(node)
        self.locks.append((node, prefix))

    @precondition(lambda self: self.locks)
    @rule(which=st.integers(0, 99))
    def unlock(self, which: int) -> None:
        node, _ = self.locks.pop(which % len(self.locks))
        self.cache.tree.unlock(node)

    @rule()
    def commit(self) -> None:
        self.cache.tree.commit(self.step)
        self.step += 1
        self.planned, self.undo = [], []

    @rule()
    def rollback(self) -> None:
        """All is as before the step, but for what was evicted."""
        keep: list[int] = []
        private: list[int] = []
        for undo in reversed(self.undo):
            holder = undo.holder
            keep += undo.private
            private += [page for page in holder.private if page not in undo.private]
            if undo.admitted:
                self.cache.tree.unlock(holder.node)
                self.holders.remove(holder)
            elif holder.node is not undo.node:
                self.move(holder, undo.node, undo.prefix)
            holder.private = undo.private
        before = {prefix: page for prefix, page in self.cached.items() if prefix not in self.planned}
        self.cache.rollback(self.step, array(sorted(set(keep))))
        self.cache.pool.release(array(private))
        self.cached = before
        self.marked &= set(before)
        self.step += 1
        self.planned, self.undo = [], []

    @precondition(lambda self: not self.undo)
    @rule()
    def clear(self) -> None:
        kept = self.protected()
        self.cache.clear()
        self.cached = {prefix: page for prefix, page in self.cached.items() if prefix in kept}
        self.marked &= kept

    # --- what always holds

    @invariant()
    def conserved(self) -> None:
        tree, pool = self.cache.tree, self.cache.pool
        held = [page for holder in self.holders for page in holder.private]
        protected = self.protected() & set(self.cached)
        assert tree.protected == len(protected)
        assert tree.evictable == len(self.cached) - len(protected)
        assert pool.free + tree.evictable + tree.protected + len(held) == pool.total
        owned = [*held, *self.cached.values()]
        assert len(set(owned)) == len(owned), "a page has two owners"
        free = pool.is_free(np.arange(pool.total, dtype=np.int32))
        assert set(np.flatnonzero(free).tolist()) == set(range(pool.total)) - set(owned)

    @invariant()
    def same_prefixes(self) -> None:
        seen: dict[Prefix, int] = {}
        path: dict[int, Prefix] = {id(self.cache.tree.root): ()}
        for node in self.cache.tree.nodes():
            start = path[id(node.parent)]
            tokens = start + tuple(node.tokens.tolist())
            path[id(node)] = tokens
            assert node.end == len(tokens)
            assert len(node.tokens) == len(node.pages) * self.page_size > 0
            for i, page in enumerate(node.pages.tolist()):
                seen[tokens[: len(start) + (i + 1) * self.page_size]] = page
        assert seen == self.cached

    @invariant()
    def heap_is_no_larger_than_the_tree(self) -> None:
        offered = sum(node.offered for node in self.cache.tree.nodes())
        missing = [node for node in self.candidates() if not node.offered and node.entry is None]
        assert not missing, "an evictable leaf is in no heap"
        assert offered <= len(self.eviction._loose)
        assert self.eviction.kept == sum(node.entry is not None for node in self.cache.tree.nodes())

    def teardown(self) -> None:
        """Once everybody is gone all can be evicted: nothing leaked."""
        self.rollback()
        while self.holders:
            self.release(self.holders[0])
        while self.locks:
            self.unlock(0)
        self.cache.clear()
        assert self.cache.pool.free == TOTAL_PAGES
        assert not list(self.cache.tree.nodes())


@pytest.mark.parametrize(
    ("page_size", "by_need", "examples"),
    [(1, False, 80), (1, True, 150), (4, False, 50), (4, True, 80), (16, True, 30)],
)
def test_tree_and_pool_agree_with_a_dict_of_prefixes(page_size: int, by_need: bool, examples: int) -> None:
    machine = type("Machine", (RadixMachine,), {"page_size": page_size, "by_need": by_need})
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))
