"""What clients get of an engine, against the bounds of the papers: real queue, scheduler and cache, no model.

Two clients whose rows wait all the time get alike, by weight, up to a bound that does not grow with time:

    DLPM   (U + Q_f + D_f) / w_f + (U + Q_g + D_g) / w_g        U = L + 2 M
    VTC    (V + D_f) / w_f + (V + D_g) / w_g                    V = max(L, 2 M')

L: tokens of the longest prompt. M: answer tokens that the rows of one client which run at a time may emit. M': the same
with their prompts, a prefix counted for every row that has it. Q: quantum by weight. D: what was reserved and returned,
as answers ended before the last step that was planned for them (0 with one step in flight). Rows of a step that failed
run again alone, before anybody's turn: the bound then grows by what that has cost.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.invariants import validate_invariants
from spark_llm.engine.request import Client, Request, SamplingParams
from spark_llm.engine.scheduling.accounts import Account
from spark_llm.engine.scheduling.fair import FairQueue
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.policies import waiting_queue
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.sharing import Deficits
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst, WaitingQueue

EOS = 2
FAIRLY = settings(deadline=None, max_examples=10, derandomize=True)


@dataclass
class Pair:
    """Two accounts whose rows have waited since ``before``, what each had been given then."""

    before: tuple[float, float]
    alone: tuple[float, float]
    least: float = 0.0
    most: float = 0.0


@dataclass
class World:
    """A scheduler and its load. Widths are by account; see the module's text for the letters."""

    draw: random.Random
    queue: WaitingQueue
    quantum: float = 0.0
    pages: int = 120
    batch: int = 24
    running: int = 6
    late: int = 2
    depth: int = 1
    longest: int = 0
    emitting: Counter[Account] = field(default_factory=Counter)  # M
    held: Counter[Account] = field(default_factory=Counter)  # M'
    returned: Counter[Account] = field(default_factory=Counter)  # D
    alone: Counter[Account] = field(default_factory=Counter)  # what rows that ran alone have cost
    waited: dict[tuple[Account, Account], Pair] = field(default_factory=dict)
    widest: float = 0.0
    next_id: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            CacheManager(self.pages, 1),
            self.queue,
            max_batch_tokens=self.batch,
            max_running_rows=self.running,
            late_rows=self.late,
        )

    def add(self, client: Client, prompt: list[int], max_tokens: int) -> int:
        self.longest = max(self.longest, len(prompt))
        params = SamplingParams(max_tokens=max_tokens)
        self.scheduler.add(Request(self.next_id, np.array(prompt, np.int32), params, client=client))
        self.next_id += 1
        return self.next_id - 1

    def step(self, ends: float = 0.1, fails: float = 0.0) -> StepPlan:
        """Plan a step, and commit the oldest if enough are in flight; or one fails, with all upon it."""
        s = self.scheduler
        idle = not s.in_flight
        before = self.given()
        plan = s.plan()
        assert plan.num_rows or not idle or not len(s), "the engine idles while rows wait"
        if plan.alone:
            for account, given in self.given().items():
                self.alone[account] += given - before.get(account, 0.0)
        self.watch()
        if s.in_flight and (len(s.in_flight) >= self.depth or not plan.num_rows):
            before = self.given()
            if self.draw.random() < fails:
                while s.in_flight:
                    for row in s.rollback(s.in_flight[-1], failed=len(s.in_flight) == 1):
                        if row.attempts > 2:
                            s.fail(row, "", {})
            else:
                oldest = s.in_flight[0]
                tokens = [EOS if self.draw.random() < ends else 7 for _ in range(oldest.num_sampled)]
                s.commit(oldest, np.array(tokens, np.int32), {EOS})
            for account, given in self.given().items():
                self.returned[account] = max(self.returned[account], round(before.get(account, given) - given))
        if s.step % 8 == 0:
            validate_invariants(s)
        return plan

    def accounts(self) -> Iterator[list[Account]]:
        """Accounts that share something: users, and the queries of each user."""
        users = list(self.scheduler.accounts.users.values())
        yield [*users]
        for user in users:
            yield [*user.queries.values()]

    def given(self) -> dict[Account, float]:
        for members in self.accounts():
            for account in members:
                account.collect()
        return {account: account.service for members in self.accounts() for account in members}

    def watch(self) -> None:
        """Note what was given to accounts with waiting rows, and what bounds it; between planning and committing."""
        emitting: Counter[Account] = Counter()
        held: Counter[Account] = Counter()
        for row in self.scheduler.running:
            assert row.account is not None
            for account in (row.account, row.account.user):
                emitting[account] += row.request.params.max_tokens
                held[account] += row.limit
        for seen, most in ((emitting, self.emitting), (held, self.held)):
            for account, tokens in seen.items():
                most[account] = max(most[account], tokens)
        given = self.given()
        waiting = {account for account in given if account.rows > account.running}
        self.waited = {pair: seen for pair, seen in self.waited.items() if waiting.issuperset(pair)}
        for members in self.accounts():
            for f, g in combinations([account for account in members if account in waiting], 2):
                now = Pair((given[f], given[g]), (self.alone[f], self.alone[g]))
                pair = self.waited.setdefault((f, g), now)
                ahead = (given[f] - pair.before[0]) / f.weight - (given[g] - pair.before[1]) / g.weight
                pair.least, pair.most = min(pair.least, ahead), max(pair.most, ahead)
                width = sum(
                    (self.slack(account) + self.alone[account] - alone) / account.weight
                    for account, alone in zip((f, g), pair.alone, strict=True)
                )
                assert pair.most - pair.least <= width + 1e-6, "one of two clients was given too much"
                self.widest = max(self.widest, (pair.most - pair.least) / width)

    def slack(self, account: Account) -> float:
        returned = self.depth * self.returned[account]
        if self.quantum:
            return self.longest + 2 * self.emitting[account] + self.quantum * account.weight + returned
        return max(self.longest, 2 * self.held[account]) + returned


def queue_of(name: str, quantum: float) -> WaitingQueue:
    if name == "dlpm":
        return FairQueue(lambda: Deficits(quantum), lambda: LongestPrefixFirst(5))
    return waiting_queue(name, quantum)


def arrive(world: World, clients: list[Client], count: int) -> None:
    for _ in range(count):
        client = world.draw.choice(clients)
        shared = [world.draw.randrange(3)] * world.draw.randrange(0, 20)
        own = [world.draw.randrange(9) for _ in range(world.draw.randrange(1, 12))]
        world.add(client, shared + own, world.draw.randrange(1, 12))


@pytest.mark.parametrize("name", ["dlpm", "vtc"])
@FAIRLY
@given(
    seed=st.integers(0, 2**32),
    users=st.integers(2, 4),
    queries=st.integers(1, 3),
    weights=st.sampled_from([(1.0,), (1.0, 2.0, 0.5, 3.0)]),
    quantum=st.sampled_from([1.0, 10.0, 60.0]),
    depth=st.integers(1, 2),
    pages=st.sampled_from([48, 120, 1000]),
    fails=st.sampled_from([0.0, 0.0, 0.1]),
    calm=st.booleans(),
)
def test_clients_that_wait_get_alike(
    name: str,
    seed: int,
    users: int,
    queries: int,
    weights: tuple[float, ...],
    quantum: float,
    depth: int,
    pages: int,
    fails: float,
    calm: bool,
) -> None:
    """Arrivals in bursts, prompts that share much or nothing, cancellations, evictions, preemptions, failures."""
    draw = random.Random(seed)
    world = World(
        draw, queue_of(name, quantum), quantum if name == "dlpm" else 0.0, pages=pages, depth=depth, running=6
    )
    clients = [
        Client(f"u{user}", f"q{query}", weights[user % len(weights)])
        for user in range(users)
        for query in range(queries)
    ]
    for _ in range(40):
        if calm:
            arrive(world, clients, max(0, 40 - len(world.scheduler.waiting)))
        else:
            arrive(world, clients[draw.randrange(len(clients)) :], draw.choice([0, 0, 1, 5, 30]))
            if draw.random() < 0.1 and world.next_id:
                world.scheduler.cancel(draw.randrange(world.next_id))
            if draw.random() < 0.1:
                world.scheduler.cache.clear()
            if draw.random() < 0.1 and world.scheduler.running and not world.scheduler.in_flight:
                world.scheduler.preempt(draw.choice(world.scheduler.running))
        world.step(ends=draw.choice([0.0, 0.2]), fails=fails)
    left = 40 * world.next_id + 100
    while len(world.scheduler) or world.scheduler.in_flight:
        world.step(ends=0.3)
        left -= 1
        assert left, "the engine makes no progress"
    assert not world.scheduler.accounts.users, "clients are remembered that have no rows"


@pytest.mark.parametrize("name", ["dlpm", "vtc", "lpm", "fcfs"])
def test_only_a_filter_keeps_to_the_bound(name: str) -> None:
    """A backfill came first, and its prompts sort before the other's, which come a few at a time."""
    world = World(random.Random(0), queue_of(name, 20.0), 0.0 if name == "vtc" else 20.0, pages=1000)
    for tail in range(400):
        world.add(Client("backfill", "all"), [0] * 10 + [tail], 4)
    with nullcontext() if name in ("dlpm", "vtc") else pytest.raises(AssertionError, match="too much"):
        for step in range(60):
            for tail in range(4):
                world.add(Client("dashboard", "some"), [1] * 10 + [step, tail], 4)
            world.step(ends=0.0)
    if name in ("dlpm", "vtc"):
        service = world.scheduler.accounts.status()
        assert service["dashboard"].tokens > 300
        assert abs(service["dashboard"].tokens - service["backfill"].tokens) < 100


@pytest.mark.parametrize("name", ["dlpm", "vtc"])
def test_a_user_with_a_hundred_queries_has_one_share(name: str) -> None:
    world = World(random.Random(0), queue_of(name, 20.0), pages=1000)
    s = world.scheduler
    for tail in range(20):
        for query in range(100):
            world.add(Client("many", f"q{query}"), [query, 7, 7, tail], 2)
        for own in range(50):
            world.add(Client("one", "q"), [100, 8, 8, tail, own], 2)
    while s.accounts.users["one"].rows > s.accounts.users["one"].running:
        plan = s.plan()
        s.commit(plan, np.full(plan.num_sampled, 7, np.int32), frozenset())
    service = s.accounts.status()
    assert service["many"].tokens == pytest.approx(service["one"].tokens, abs=100)
    queries = []
    for query in s.accounts.users["many"].queries.values():
        query.collect()
        queries.append(query.service)
    assert len(queries) == 100
    assert max(queries) - min(queries) <= 2 * (20 + 4 + 2 * 12)
    assert min(queries) > 20


@pytest.mark.parametrize(("name", "most"), [("dlpm", 16), ("vtc", 16), ("fcfs", 300), ("lpm", 300)])
def test_a_small_query_does_not_wait_for_a_backfill(name: str, most: int) -> None:
    """Steps from its arrival to its last answer: 8 alone. Without a filter it waits for all that came before."""
    world = World(random.Random(0), queue_of(name, 24.0), pages=1000)
    s = world.scheduler
    for tail in range(600):
        world.add(Client("backfill", "all"), [0] * 10 + [tail // 100, tail % 100], 2)
    for _ in range(10):
        plan = s.plan()
        s.commit(plan, np.full(plan.num_sampled, 7, np.int32), frozenset())
    small = {world.add(Client("dashboard", "some"), [1] * 10 + [tail], 2) for tail in range(20)}
    steps = 0
    while small:
        plan = s.plan()
        small -= {done.id for done in s.commit(plan, np.full(plan.num_sampled, 7, np.int32), frozenset())}
        steps += 1
    assert steps <= most
    assert (steps > 50) == (name in ("lpm", "fcfs"))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("pages", [60, 1000])
def test_long_answers_make_way_for_a_client_none_of_whose_rows_runs(depth: int, pages: int) -> None:
    """All lanes, or all pages, hold rows of the backfill, which will not end for long. Nobody loses an answer."""
    world = World(random.Random(0), queue_of("dlpm", 24.0), pages=pages, depth=depth, running=4)
    s = world.scheduler
    for tail in range(8):
        world.add(Client("backfill", "all"), [0] * 10 + [tail], 40)
    for _ in range(4):
        world.step(ends=0.0)
    world.add(Client("dashboard", "some"), [1] * 10, 2)
    steps = 0
    while "dashboard" in s.accounts.users:
        world.step(ends=0.0)
        steps += 1
    assert steps < 30
    assert s.accounts.users["backfill"].rows == 8, "it was to come before a long answer ended"
    while len(s) or s.in_flight:
        world.step(ends=0.0)
    assert s.charging.settled == 10 + 2 * 2 + 18 + 8 * 2 * 40
