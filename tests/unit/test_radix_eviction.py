"""What eviction knows of the rows to come, and which prefix it lets go: single behaviours."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_llm.engine.cache.eviction import LeastRecentlyUsed, NeededLast
from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.radix import Node
from spark_llm.engine.prefix import common_tokens, shared_tokens, shared_with_next, sort_key
from spark_llm.engine.request import Hints, Request, SamplingParams
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


class World:
    """A cache with rows that wait; ``put`` is a row that was computed and is done."""

    def __init__(self, pages: int = 1000, page_size: int = 1) -> None:
        self.cache = CacheManager(pages, page_size)
        self.eviction = self.cache.eviction
        self.waiting = LongestPrefixFirst()
        self.eviction.follow(self.waiting)
        self.step = 0

    def put(self, tokens: list[int], hints: Hints | None = None, shared: int = 0) -> None:
        tree, size = self.cache.tree, self.cache.page_size
        node, _ = tree.match(array(tokens))
        rest = tokens[node.end : len(tokens) // size * size]
        if rest:
            pages = self.cache.pool.allocate(len(rest) // size)
            inserted = tree.insert(node, array(rest), pages, self.step)
            assert inserted is not None
            node = inserted
            tree.commit(self.step)
        tree.lock(node)
        if hints is not None:
            self.eviction.done(tree.match(array(tokens[: hints.shared_tokens]))[0], hints)
        tree.unlock(node)
        self.step += 1

    def wait(self, *prompts: list[int]) -> list[Row]:
        rows = []
        for tokens in prompts:
            request = Request(self.step, array(tokens), SamplingParams(max_tokens=1))
            rows.append(Row(request, self.step, self.cache.tree.root))
            self.waiting.push(rows[-1])
            self.step += 1
        return rows

    def admit(self) -> Row:
        """The queue's next row leaves it."""
        row = self.waiting.peek()
        assert row is not None
        self.waiting.take(row)
        return row

    def evict_all(self) -> list[list[int]]:
        """Whole paths of what is evicted, in order."""
        return self.evict(sys.maxsize)

    def evict(self, count: int) -> list[list[int]]:
        """The same, at most ``count`` nodes."""
        order: list[list[int]] = []
        while len(order) < count:
            left = {id(node): self.tokens(node) for node in self.cache.tree.nodes()}
            if not self.cache.tree.evict(1):
                break
            now = {id(node) for node in self.cache.tree.nodes()}
            order += [path for node, path in left.items() if node not in now]
        return order

    @staticmethod
    def tokens(node: Node) -> list[int]:
        return np.frombuffer(node.path, ">u4").tolist()


def test_what_waiting_rows_need_stays_longest_and_the_farthest_of_it_goes_first() -> None:
    world = World()
    for tokens in ([1, 1], [2, 2], [3, 3], [4, 4], [5, 5]):
        world.put(tokens)
    world.wait([4, 4, 9], [1, 1, 9], [2, 2, 9])
    assert world.evict_all() == [[3, 3], [5, 5], [4, 4], [2, 2], [1, 1]]


def test_the_walk_decides_what_is_far_not_the_tokens() -> None:
    """Rows before the walk's place come only after it has begun anew."""
    world = World()
    world.wait([3, 3, 0])
    assert world.admit().request.prompt.tolist() == [3, 3, 0]
    for tokens in ([1, 1], [2, 2], [4, 4], [5, 5]):
        world.put(tokens)
    world.wait([1, 1, 9], [2, 2, 9], [4, 4, 9], [5, 5, 9])
    assert world.evict_all() == [[2, 2], [1, 1], [5, 5], [4, 4]]


def test_of_a_run_that_is_needed_in_part_the_rest_goes_first() -> None:
    world = World()
    world.put([1, 2, 3, 4, 5, 6])
    world.wait([1, 2, 3, 9])
    assert [run.tolist() for run in world.cache.tree.evict(1)] == [[3, 4, 5]]
    assert [node.end for node in world.cache.tree.nodes()] == [3]


def test_a_part_is_kept_in_whole_pages() -> None:
    world = World(page_size=4)
    world.put(list(range(12)))
    world.wait([*range(6), 99, 99])
    assert len(world.cache.tree.evict(1)[0]) == 2
    assert [node.end for node in world.cache.tree.nodes()] == [4]


def test_a_returned_row_keeps_its_prefix_to_the_end() -> None:
    world = World()
    for tokens in ([1, 1], [2, 2]):
        world.put(tokens)
    world.wait([1, 1, 9], [2, 2, 9])
    world.waiting.push_back(world.admit())
    assert world.evict_all() == [[2, 2], [1, 1]]


def test_without_rows_to_come_the_order_is_that_of_use() -> None:
    world = World()
    for number in (4, 2, 3, 1):
        world.put([number])
    assert world.evict_all() == [[4], [2], [3], [1]]


def test_cancelled_rows_need_nothing() -> None:
    world = World()
    for tokens in ([1, 1], [2, 2]):
        world.put(tokens)
    rows = world.wait([1, 1, 9], [2, 2, 9])
    world.put([7])
    world.cache.tree.evict(1)
    assert world.eviction.kept == 2, "both were judged and kept aside"
    world.waiting.remove(rows[0])
    world.eviction.reconsider()
    assert world.evict_all() == [[1, 1], [2, 2]]


def test_the_next_window_is_taken_to_go_on_with_the_last_group() -> None:
    world = World()
    world.eviction.open(1, "q")
    world.put([1, 2, 3, 4])
    world.put([5, 5])
    world.eviction.announce(sort_key(array([1, 2, 3, 4])), Hints(1, "q", shared_next=2))
    assert world.evict_all() == [[1, 2, 3, 4], [5, 5], [1, 2]]
    for how in ("another row", "the end"):
        world.put([1, 2])
        world.put([5, 5])
        world.eviction.announce(sort_key(array([1, 2, 9])), Hints(1, "q", shared_next=2))
        world.cache.tree.evict(1)
        world.put([6, 6])
        if how == "another row":
            world.eviction.announce(sort_key(array([7])), Hints(1, "q"))
        else:
            world.eviction.close(1)
        assert world.evict_all() == [[1, 2], [6, 6]]


def test_later_calls_find_what_was_marked_first() -> None:
    """The second pass over the same rows is in the order of the first: the cache keeps the rows that come first."""
    world = World()
    world.eviction.open(1, "q")
    first = Hints(1, "q", later_calls=1, shared_tokens=2)
    for number in range(1, 6):
        world.put([number, number, 77], first)
    world.put([9, 9])
    assert world.evict_all() == [
        *([number, number, 77] for number in range(1, 6)),
        [9, 9],
        *([number, number] for number in range(5, 0, -1)),
    ]


def test_a_mark_goes_with_the_row_it_counts_or_with_its_query() -> None:
    world = World()
    world.eviction.open(1, "q")
    world.eviction.open(2, "q")
    for number in range(1, 5):
        world.put([number, number, 77], Hints(1, "q", later_calls=1, shared_tokens=2))
    world.put([1, 1, 88], Hints(2, "q", later_calls=0, shared_tokens=2))
    world.put([5])
    order = world.evict_all()
    assert order[-5:] == [[1, 1], [5], [4, 4], [3, 3], [2, 2]]
    for number in range(1, 3):
        world.put([number, number], Hints(1, "q", later_calls=1, shared_tokens=2))
    world.put([6])
    world.eviction.close(1)
    assert all(node.marks for node in world.cache.tree.nodes() if node.end == 2)
    world.eviction.close(2)
    world.cache.tree.match(array([2, 2]))
    assert world.evict_all() == [[1, 1], [6], [2, 2]], "as they were used"


def test_marks_of_rows_that_never_come_are_given_up() -> None:
    """A filter drops the first rows; those that come later find their own marks, not a cache full of old ones."""
    world = World()
    world.eviction.open(1, "q")
    for number in range(100):
        world.put([number, number], Hints(1, "q", later_calls=1, shared_tokens=2))
        if number == 10:  # comes ten rows after it left its mark; its forerunners never do
            world.put([0, 0], Hints(1, "q", later_calls=0, shared_tokens=2))
        if number == 12:  # all are needed still, and are kept aside
            assert world.evict(2) == [[0, 0], [12, 12]]
    order = [path[0] for path in world.evict_all()]
    live = order.index(99)
    assert order[live:] == list(range(99, 99 - len(order[live:]), -1))
    assert 20 <= len(order[live:]) < 30, "old marks outlive new ones"


def test_three_calls_leave_and_take_marks_in_turn() -> None:
    world = World()
    world.eviction.open(1, "q")
    node_of = lambda: next(node for node in world.cache.tree.nodes() if node.end == 2)  # noqa: E731
    for later, left in ((2, 1), (1, 1), (0, 0)):
        world.put([1, 1], Hints(1, "q", later_calls=later, shared_tokens=2))
        marks = node_of().marks or {}
        assert [level for _, level in marks] == [later] * left


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_second_call_over_the_same_rows_finds_what_fits(share: float) -> None:
    """LRU finds nothing there: whatever is to be used next was evicted last."""
    found = {}
    rows, fields, calls = 120, 30, ([1, 2], [3, 4])
    pages = int(share * rows * fields) + 40
    for eviction in (LeastRecentlyUsed(), NeededLast(1)):
        cache = CacheManager(pages, 1, eviction)
        scheduler = Scheduler(cache, LongestPrefixFirst(), max_batch_tokens=64, max_running_rows=1)
        eviction.open(0, "q")
        cached = 0
        for at, ask in enumerate(calls):
            for row in range(rows):
                prompt = array([*range(100 * row, 100 * row + fields), *ask])
                hints = Hints(0, "q", later_calls=1 - at, shared_tokens=fields)
                scheduler.add(Request(1000 * at + row, prompt, SamplingParams(max_tokens=1), hints=hints))
                while len(scheduler):
                    plan = scheduler.plan()
                    sampled = np.full(plan.num_sampled, 7, np.int32)
                    cached += sum(done.cached_tokens for done in scheduler.commit(plan, sampled, frozenset()))
        found[type(eviction)] = cached / (rows * fields)
    assert found[LeastRecentlyUsed] == 0
    assert found[NeededLast] >= share - 0.02


@pytest.mark.parametrize("needed", [100, 10_000])
def test_evicting_a_node_costs_the_same_however_much_is_needed(needed: int) -> None:
    """Counted in lines run. All but a few leaves are needed; each is judged once, not at every eviction."""
    world = World(pages=3 * needed + 1000)
    for number in range(needed):
        world.put([number, number])
    world.wait(*([number, number, 1] for number in range(needed)))
    world.put([needed + 1])
    world.cache.tree.evict(1)
    assert world.eviction.kept == needed
    lines = 0

    def count(_frame: object, event: str, _argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return count

    previous = sys.gettrace()
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        for number in range(50):
            world.put([needed + 2 + number])
            world.cache.tree.evict(1)
    finally:
        sys.settrace(previous)
    assert world.eviction.kept == needed
    assert lines / 50 < 250


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=20)


@given(PROMPTS, st.integers(0, 19), st.integers(0, 6))
def test_next_use_names_the_longest_part_and_the_order_of_admission(
    prompts: list[list[int]], pops: int, beyond: int
) -> None:
    """Against all rows one by one; for paths needed as a whole, in the order in which the rows are then admitted."""
    world = World()
    world.wait(*prompts)
    for _ in range(min(pops, len(prompts) - 1)):
        world.admit()
    left = [row.request.prompt for row in [*world.waiting._rows]]
    paths = sorted({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})
    uses = {}
    for path in (path for path in paths if len(path) > beyond):
        expected = max(common_tokens(prompt, array(list(path))) for prompt in left)
        found = world.waiting.next_use(sort_key(array(list(path))), beyond)
        assert (found is None) == (expected <= beyond)
        if found is not None:
            assert found[0] == expected
            if expected == len(path):
                uses[path] = found[1]
    admitted = [tuple(world.admit().request.prompt.tolist()) for _ in left]
    first = {path: next(at for at, row in enumerate(admitted) if row[: len(path)] == path) for path in uses}
    for one, other in pairwise(sorted(uses, key=lambda path: (uses[path], first[path]))):
        assert first[one] <= first[other]


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6))
def test_shared_tokens_agree_with_a_loop(prompts: list[list[int]]) -> None:
    def shared(a: list[int], b: list[int]) -> int:
        return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    expected = [shared(a, b) for a, b in pairwise(prompts)]
    assert (
        shared_with_next([array(prompt) for prompt in prompts]) == [*expected, *(expected[-1:] or [0])][: len(prompts)]
    )
    for a, b in pairwise(prompts):
        assert shared_tokens(sort_key(array(a)), sort_key(array(b))) == shared(a, b)
