"""The order in which waiting rows are admitted: prefixes together, nobody forgotten."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.cache.radix import RadixTree
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst, WaitingQueue

ROOT = RadixTree(1).root


def row(sequence: int, prompt: list[int]) -> Row:
    return Row(Request(sequence, np.array(prompt, np.int32), SamplingParams(max_tokens=1)), sequence, ROOT)


def fill(queue: LongestPrefixFirst, prompts: list[list[int]]) -> list[Row]:
    rows = [row(i, prompt) for i, prompt in enumerate(prompts)]
    for waiting in rows:
        queue.push(waiting)
    return rows


def pop(queue: WaitingQueue) -> Row:
    taken = queue.peek()
    assert taken is not None
    queue.take(taken)
    return taken


def shared(a: Row, b: Row) -> int:
    pairs = zip(a.request.prompt.tolist(), b.request.prompt.tolist(), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.request.prompt), len(b.request.prompt)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30))
def test_rows_that_wait_come_in_an_order_that_walks_their_tree_once(prompts: list[list[int]]) -> None:
    """Each row shares as much with its predecessor as with any row before it: no prefix is left and taken up again."""
    queue = LongestPrefixFirst(patience=10_000)
    fill(queue, prompts)
    order = [pop(queue) for _ in prompts]
    for i, waiting in enumerate(order[1:], start=1):
        assert shared(waiting, order[i - 1]) == max(shared(waiting, other) for other in order[:i])


def test_the_row_that_shares_most_with_the_last_admission_is_next_wherever_it_sorts() -> None:
    queue = LongestPrefixFirst()
    rows = fill(queue, [[5, 5, 9], [5, 5, 1], [6], [5, 5, 5]])
    queue._cursor = rows[0].key
    assert pop(queue) is rows[0]
    assert [pop(queue).sequence for _ in range(3)] == [3, 1, 2]


def test_tokens_sort_as_numbers_not_as_bytes() -> None:
    queue = LongestPrefixFirst()
    fill(queue, [[256], [1], [65536], [255]])
    assert [pop(queue).request.prompt[0] for _ in range(4)] == [1, 255, 256, 65536]


def test_rows_that_return_go_first_the_last_one_at_the_head() -> None:
    queue = LongestPrefixFirst()
    rows = fill(queue, [[1], [2], [3]])
    first, second = pop(queue), pop(queue)
    queue.push_back(second)
    queue.push_back(first)
    assert len(queue) == 3
    assert [pop(queue) for _ in range(3)] == rows
    assert queue.peek() is None


def test_peek_shows_the_same_row_until_it_is_taken_and_removed_rows_are_gone() -> None:
    queue = LongestPrefixFirst()
    rows = fill(queue, [[1], [2], [3], [4]])
    seen = queue.peek()
    assert seen is queue.peek()
    assert seen is not None
    queue.remove(seen)
    returned = pop(queue)
    queue.push_back(returned)
    queue.remove(returned)
    left = {pop(queue).sequence for _ in range(2)}
    assert left == {r.sequence for r in rows} - {seen.sequence, returned.sequence}
    assert len(queue) == 0


class Watch:
    """Counts for each row how many rows that came later were admitted before it."""

    def __init__(self, queue: LongestPrefixFirst) -> None:
        self.queue = queue
        self.waiting: dict[int, Row] = {}
        self.overtaken: Counter[int] = Counter()
        self.most = 0
        self.next_sequence = 0

    def push(self, prompt: list[int]) -> None:
        new = row(self.next_sequence, prompt)
        self.next_sequence += 1
        self.most = max(self.most if self.waiting else 0, len(self.waiting) + 1)
        self.waiting[new.sequence] = new
        self.queue.push(new)

    def pop(self) -> Row:
        taken = pop(self.queue)
        del self.waiting[taken.sequence]
        for sequence in self.waiting:
            if sequence < taken.sequence:
                self.overtaken[sequence] += 1
                bound = self.queue.patience + 10 * self.most + 8
                assert self.overtaken[sequence] <= bound, "a row was overtaken too often"
        return taken

    def cancel(self, sequence: int) -> None:
        self.queue.remove(self.waiting.pop(sequence))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 0.1))
def test_no_row_is_overtaken_beyond_the_bound(
    patience: int, waiting: int, seed: int, hot: float, cancelled: float
) -> None:
    """Arrivals that share a prefix with the last admission keep coming: pure longest prefix first would starve."""
    draw = random.Random(seed)
    watch = Watch(LongestPrefixFirst(patience))
    for _ in range(waiting):
        watch.push([draw.randrange(50), draw.randrange(3)])
    last = watch.pop()
    for _ in range(800):
        if draw.random() < hot:
            watch.push([int(last.request.prompt[0]), draw.randrange(1000)])
        else:
            watch.push([draw.randrange(50), draw.randrange(1000)])
        if draw.random() < cancelled:
            watch.cancel(draw.choice(list(watch.waiting)))
        if watch.waiting:
            last = watch.pop()


def test_a_row_that_shares_nothing_is_admitted_although_others_keep_coming() -> None:
    watch = Watch(LongestPrefixFirst(patience=20))
    watch.push([7, 7])
    watch.push([1, 0])
    watch.push([1, 1])
    assert watch.pop().request.prompt[0] == 1
    pops = 0
    while 0 in watch.waiting:
        watch.push([1, 2 + pops])
        watch.pop()
        pops += 1
    assert 20 <= pops <= 20 + 10 * 3 + 8


def test_old_rows_do_not_end_the_walk() -> None:
    """160 rows of 20 groups starve behind a group that keeps growing, and are due at once: groups stay together."""
    queue = LongestPrefixFirst(patience=0)
    draw = random.Random(3)
    starving = [[group, tail] for group in range(1, 21) for tail in range(8)]
    draw.shuffle(starving)
    fill(queue, starving)
    groups = []
    for sequence in range(len(starving), len(starving) + 2000):
        queue.push(row(sequence, [0, sequence]))
        groups.append(int(pop(queue).request.prompt[0]))
    assert set(groups) == set(range(21))
    starved = [group for group in groups if group]
    assert len(starved) == 160
    switches = sum(a != b for a, b in itertools.pairwise(starved))
    assert switches < 60  # one after another they would be about 150
