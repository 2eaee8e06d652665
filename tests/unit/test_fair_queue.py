"""The queue in which clients share: its order, what it remembers of clients, and what it tells eviction."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.radix import RadixTree
from spark_llm.engine.prefix import sort_key
from spark_llm.engine.request import Client, Request, SamplingParams
from spark_llm.engine.scheduling.accounts import Accounts, QueryAccount
from spark_llm.engine.scheduling.fair import FairQueue
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.sharing import Counters, Deficits
from spark_llm.engine.scheduling.waiting import FirstComeFirstServed, LongestPrefixFirst

ROOT = RadixTree(1).root


class World:
    """A queue without an engine: who is taken is charged ``cost`` tokens."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.accounts = Accounts()
        self.arrived = 0

    def row(self, prompt: list[int], user: str = "", query: str = "", weight: float = 1.0) -> Row:
        client = Client(user, query, weight)
        request = Request(self.arrived, np.array(prompt, np.int32), SamplingParams(max_tokens=1), client=client)
        self.arrived += 1
        return Row(request, self.arrived, ROOT, self.accounts.open(client))

    def push(self, prompt: list[int], user: str = "", query: str = "", weight: float = 1.0) -> Row:
        row = self.row(prompt, user, query, weight)
        self.queue.push(row)
        return row

    def take(self, cost: float = 0.0) -> Row:
        row = self.queue.peek()
        assert row is not None
        account = row.account
        assert account is not None
        self.queue.take(row)
        self.accounts.charge(account, cost)
        return row

    def leave(self, *rows: Row) -> None:
        for row in rows:
            assert row.account is not None
            self.accounts.close(row.account, 0)
        for query in self.accounts.sweep(1):
            self.queue.gone(query)


def dlpm(quantum: float = 10.0) -> World:
    return World(FairQueue(lambda: Deficits(quantum), LongestPrefixFirst))


def vtc() -> World:
    return World(FairQueue(Counters, FirstComeFirstServed))


def user_of(row: Row) -> str:
    return row.request.client.user


@pytest.mark.parametrize("seed", range(20))
def test_one_client_is_served_as_if_there_were_no_clients(seed: int) -> None:
    """Arrivals, admissions that cost much or nothing, rows that return, cancellations."""
    draw = random.Random(seed)
    world, plain = dlpm(), LongestPrefixFirst()
    waiting: list[Row] = []
    taken: list[Row] = []
    for _ in range(300):
        action = draw.random()
        if action < 0.5 or not waiting:
            row = world.push([draw.randrange(3) for _ in range(draw.randrange(1, 6))])
            plain.push(row)
            waiting.append(row)
        elif action < 0.8:
            assert plain.peek() is world.queue.peek()
            taken.append(world.take(draw.choice([0.0, 3.0, 50.0])))
            plain.take(taken[-1])
            waiting.remove(taken[-1])
        elif action < 0.9 and taken:
            waiting.append(taken.pop())
            world.queue.push_back(waiting[-1])
            plain.push_back(waiting[-1])
        else:
            gone = waiting.pop(draw.randrange(len(waiting)))
            world.queue.remove(gone)
            plain.remove(gone)
        assert len(plain) == len(world.queue) == len(waiting)
        path = sort_key(np.array([draw.randrange(3) for _ in range(3)], np.int32))
        assert plain.next_use(path, 0) == world.queue.next_use(path, 0)


def test_who_has_credit_is_served_along_the_prefixes_and_then_the_others_are() -> None:
    world = dlpm(quantum=3.0)
    for tail in range(4):
        world.push([1, tail], "a")
        world.push([2, tail], "b")
    assert [user_of(world.take(1.0)) for _ in range(8)] == [*"aaabbbba"]


def test_a_weight_is_a_share() -> None:
    world = dlpm(quantum=2.0)
    for tail in range(40):
        world.push([1, tail], "a", weight=4.0)
        world.push([2, tail], "b")
    taken = [user_of(world.take(1.0)) for _ in range(40)]
    assert taken.count("a") == 32


def test_a_debt_outlives_its_client_for_one_round_and_credit_does_not() -> None:
    world = dlpm(quantum=10.0)
    first = world.push([1], "a")
    world.push([2], "b")
    other = world.push([3], "b")
    assert world.take(95.0) is first  # a has 85 too many
    assert user_of(world.take(1.0)) == "b"
    world.leave(first)  # before the next round
    again = world.push([1], "a")
    assert again.account is not first.account
    assert again.account is not None
    assert again.account.user.balance == -85
    world.queue.remove(again)
    world.leave(again)
    world.take(50.0)
    world.push([9], "b")
    assert user_of(world.take(1.0)) == "b"  # it took a round
    fresh = world.push([1], "a")
    assert fresh.account is not None
    assert fresh.account.user.balance == 0
    assert other.account is not None
    world.leave(fresh)


def test_who_had_nothing_waiting_is_lifted_to_the_least_counter() -> None:
    world = vtc()
    for tail in range(30):
        world.push([1, tail], "a")
    for _ in range(10):
        world.take(5.0)
    for tail in range(10):
        world.push([2, tail], "late")
    assert sorted(user_of(world.take(5.0)) for _ in range(10)) == ["a"] * 5 + ["late"] * 5


def test_a_counter_of_a_client_that_is_gone_is_remembered_as_long_as_it_counts() -> None:
    world = vtc()
    greedy = world.push([1], "greedy")
    for tail in range(20):
        world.push([2, tail], "b")
    assert world.take(100.0) is greedy
    world.take(5.0)
    world.leave(greedy)
    again = world.push([1], "greedy")
    assert again.account is not None
    assert again.account.user.balance == -100
    assert {user_of(world.take(5.0)) for _ in range(19)} == {"b"}
    assert world.take() is again


def test_what_is_returned_gives_the_turn_back() -> None:
    world = dlpm(quantum=10.0)
    first = world.push([1], "a")
    for tail in range(3):
        world.push([1, tail], "a")
        world.push([2, tail], "b")
    assert world.take(30.0) is first
    assert user_of(world.queue.peek()) == "b"  # type: ignore[arg-type]
    assert isinstance(first.account, QueryAccount)
    world.accounts.charge(first.account, -30.0)
    world.queue.credited(first.account)
    assert user_of(world.queue.peek()) == "a"  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(10))
def test_eviction_hears_of_the_rows_of_all_clients(seed: int) -> None:
    draw = random.Random(seed)
    world = dlpm(quantum=4.0)
    waiting: list[Row] = []
    for _ in range(120):
        if draw.random() < 0.6 or not waiting:
            prompt = [draw.randrange(3) for _ in range(draw.randrange(1, 6))]
            waiting.append(world.push(prompt, draw.choice("abc"), draw.choice("pq")))
        else:
            row = world.take(draw.choice([1.0, 9.0]))
            waiting.remove(row)
            if draw.random() < 0.3:
                world.queue.push_back(row)
                waiting.append(row)
        path = [draw.randrange(3) for _ in range(draw.randrange(1, 6))]
        beyond = draw.randrange(len(path))
        found = world.queue.next_use(sort_key(np.array(path, np.int32)), beyond)
        shared = max((_shared(row.request.prompt.tolist(), path) for row in waiting), default=0)
        assert (found[0] if found else 0) == (shared if shared > beyond else 0)


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_client_that_goes_twice_is_kept_as_long_as_a_step_is_about_it() -> None:
    """Its account must not be another's when what it reserved in that step is returned."""
    s = Scheduler(CacheManager(64, 1), dlpm().queue, max_batch_tokens=16, max_running_rows=8)
    plans = []
    for row in range(2):
        s.add(Request(row, np.array([row, 5], np.int32), SamplingParams(max_tokens=2), client=Client("first")))
        plans.append(s.plan())
        s.cancel(row)
    s.commit(plans[0], np.array([7], np.int32), ())
    s.add(Request(2, np.array([2, 5], np.int32), SamplingParams(max_tokens=2), client=Client("second")))
    s.commit(plans[1], np.array([7], np.int32), ())
    assert [(user, service.tokens) for user, service in s.accounts.status().items()] == [("second", 0.0)]


def test_what_a_client_took_alone_is_not_held_against_it() -> None:
    """It was alone for a hundred quanta; from the arrival of another on they take turns."""
    world = dlpm(quantum=10.0)
    for tail in range(30):
        world.push([1, tail], "first")
    for _ in range(10):
        world.take(100.0)
    for tail in range(10):
        world.push([2, tail], "second")
    assert 8 <= [user_of(world.take(5.0)) for _ in range(20)].count("second") <= 10


@pytest.mark.parametrize("seed", range(10))
def test_eviction_hears_of_the_rows_of_a_query_that_is_left_alone(seed: int) -> None:
    """Whichever query is left, and whoever comes then."""
    draw = random.Random(seed)
    world = dlpm(quantum=4.0)
    waiting: list[Row] = []
    for turn in range(60):
        query = draw.choice("ab") if turn % 20 < 10 else "ab"[turn // 20 % 2]
        if draw.random() < 0.5 or not waiting:
            waiting.append(world.push([draw.randrange(2) for _ in range(3)], query))
        else:
            row = draw.choice([row for row in waiting if user_of(row) != query] or waiting)
            waiting.remove(row)
            world.queue.remove(row)
        for path in ([0], [1], [0, 1], [1, 1, 0]):
            found = world.queue.next_use(sort_key(np.array(path, np.int32)), len(path) - 1)
            assert (found is not None) == any(row.request.prompt[: len(path)].tolist() == path for row in waiting)


def test_a_client_that_comes_late_finds_a_lane_beside_long_answers() -> None:
    """The batch has all lanes but those that are kept, and none of its rows ends for long."""
    s = Scheduler(CacheManager(1024, 1), dlpm().queue, max_batch_tokens=64, max_running_rows=4, late_rows=2)
    _ask(s, "batch", range(10))
    for _ in range(5):
        _step(s)
    assert _running(s) == ["batch"] * 4
    _ask(s, "late", range(10, 13))
    _step(s)
    _step(s)
    assert _running(s) == ["batch"] * 4 + ["late"] * 2


def test_no_lanes_are_kept_where_nobody_shares() -> None:
    s = Scheduler(CacheManager(1024, 1), LongestPrefixFirst(), max_batch_tokens=64, max_running_rows=4, late_rows=2)
    _ask(s, "batch", range(10))
    _ask(s, "late", range(10, 13))
    for _ in range(5):
        _step(s)
    assert len(_running(s)) == 4


def _ask(s: Scheduler, client: str, rows: Iterable[int]) -> None:
    for row in rows:
        s.add(Request(row, np.array([row, 5], np.int32), SamplingParams(max_tokens=50), client=Client(client)))


def _step(s: Scheduler) -> None:
    plan = s.plan()
    s.commit(plan, np.full(plan.num_sampled, 7, np.int32), ())


def _running(s: Scheduler) -> list[str]:
    return [row.request.client.user for row in s.running]
