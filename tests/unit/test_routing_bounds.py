"""What D2LPM promises (arXiv 2501.14312): deficits within bounds, engines shared alike, clients within 2|W|(U+Q)."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.service.routing import Block, Path, PrefixGroup, Router, Share
from spark_llm.engine.service.routing.policies import DoubleDeficit

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
QUANTA = st.sampled_from([50.0, 400.0, 3_000.0])
OWN, PREFIX = 40, 120  # most tokens of a row and of a prefix
GROUPS = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, OWN), st.integers(1, 30))


def path_of(number: int) -> Path:
    return Block(1, 20), Block(10 + number, (PREFIX - 20) * number // 3)


def group(client: str, prefix: int, own: int, rows: int, weight: float = 1.0) -> PrefixGroup:
    return PrefixGroup(client=client, path=path_of(prefix), rows=rows, own_tokens=own, output_tokens=0, weight=weight)


class Charges:
    """Counts, from outside, what clients have been sent: rows that are done in truth, others as estimated."""

    def __init__(self, quantum: float, engines: int) -> None:
        self.router = Router("d2lpm", quantum)
        for number in range(engines):
            self.router.engine_added(f"e{number}")
        self.open: dict[Share, float] = {}  # -> estimated service
        self.by_client: dict[str, list[float]] = defaultdict(lambda: [0.0] * engines)
        self.dispatch(group("beside", 0, 1, 1))  # a client alone is not charged

    def deficits(self) -> dict[str, list[float]]:
        assert isinstance(self.router.policy, DoubleDeficit)
        accounts = self.router.policy.deficits.accounts
        return {name: account.deficits for name, account in accounts.items() if name != "beside"}

    def dispatch(self, asked: PrefixGroup) -> None:
        before = {name: found.service for name, found in self.router.queued().items()}
        for share in self.router.dispatch(asked):
            work = self.router.queued()[share.engine].service - before[share.engine]
            self.open[share] = work
            self.by_client[asked.client][int(share.engine[1:])] += work

    def finish(self, which: int, error: int) -> None:
        """All rows of a share are done and took ``error`` tokens more than was thought."""
        shares = [share for share in self.open if share.group.client != "beside"]
        share = shares[which % len(shares)]
        estimated = self.open.pop(share)
        service = max(0, round(estimated) + error)
        self.by_client[share.group.client][int(share.engine[1:])] += service - estimated
        self.router.finished(share.id, share.group.rows, service, 0)


MOVES = st.lists(st.tuples(GROUPS, st.booleans(), st.integers(0, 99), st.integers(-500, 500)), max_size=40)


@EXAMPLES
@given(moves=MOVES, quantum=QUANTA, engines=st.integers(2, 5), weight=st.sampled_from([0.5, 1.0, 3.0]))
def test_deficits_keep_within_a_piece_and_a_quantum(moves, quantum, engines, weight):
    """-U < q <= Q where estimates hold; so no engine has had U + Q more of a client than another."""
    charges = Charges(quantum, engines)
    for (client, prefix, own, rows), ends, which, _ in moves:
        charges.dispatch(group(str(client), prefix, own, rows, weight if client == 2 else 1.0))
        if ends:
            charges.finish(which, 0)
        for name, deficits in charges.deficits().items():
            credit = quantum * (weight if name == "2" else 1.0)
            largest = PREFIX + max(credit, OWN)  # U: a piece has one row, or a quantum's worth of them
            assert all(-largest < q <= credit for q in deficits)
            had = charges.by_client[name]
            assert max(had) - min(had) < largest + credit


@EXAMPLES
@given(moves=MOVES, quantum=QUANTA, engines=st.integers(2, 5))
def test_a_wrong_estimate_is_made_good(moves, quantum, engines):
    """Reserved, settled, given back: what a client had of an engine and its deficit there have the same sum on all."""
    charges = Charges(quantum, engines)
    for (client, prefix, own, rows), ends, which, error in moves:
        charges.dispatch(group(str(client), prefix, own, rows))
        if ends:
            charges.finish(which, error)
        for name, deficits in charges.deficits().items():
            sums = [had + q for had, q in zip(charges.by_client[name], deficits, strict=True)]
            assert sums == pytest.approx([sums[0]] * engines)


class FakeEngine:
    """Serves rows one at a time by local deficits, as the scheduler does; among clients in credit as it is told."""

    def __init__(self, quantum: float) -> None:
        self.quantum = quantum
        self.queues: dict[str, deque[tuple[int, int]]] = defaultdict(deque)  # client -> (share, tokens of a row)
        self.deficits: dict[str, float] = defaultdict(float)
        self.cached: set[int] = set()

    def serve(self, choice: int) -> tuple[str, int, int] | None:
        """Client, share and service of the row that is served."""
        waiting = [client for client, queue in sorted(self.queues.items()) if queue]
        if not waiting:
            return None
        while not (funded := [client for client in waiting if self.deficits[client] > 0]):
            for client in waiting:
                self.deficits[client] += self.quantum
        client = funded[choice % len(funded)]
        share, tokens = self.queues[client].popleft()
        self.deficits[client] -= tokens
        return client, share, tokens


class Cluster:
    def __init__(self, policy: str, quantum: float, engines: int) -> None:
        self.router = Router(policy, quantum)
        self.engines = {f"e{number}": FakeEngine(quantum) for number in range(engines)}
        for name in self.engines:
            self.router.engine_added(name)
        self.service: dict[str, int] = defaultdict(int)

    def dispatch(self, asked: PrefixGroup) -> None:
        for share in self.router.dispatch(asked):
            engine = self.engines[share.engine]
            for _ in range(share.group.rows):
                missing = sum(block.tokens for block in asked.path if block.hash not in engine.cached)
                engine.cached |= {block.hash for block in asked.path}
                engine.queues[asked.client].append((share.id, missing + int(asked.own_tokens)))

    def serve(self, engine: str, choice: int) -> None:
        served = self.engines[engine].serve(choice)
        if served is not None:
            client, share, tokens = served
            self.service[client] += tokens
            self.router.finished(share, 1, tokens, 0)

    def lose(self, engine: str) -> None:
        del self.engines[engine]
        for share in self.router.engine_lost(engine):
            self.dispatch(share.group)

    def waits_everywhere(self, client: str) -> bool:
        return all(engine.queues[client] for engine in self.engines.values())


@EXAMPLES
@given(
    groups=st.tuples(
        *[st.lists(st.tuples(st.integers(0, 3), st.integers(10, OWN), st.integers(10, 30)), min_size=1)] * 2
    ),
    choices=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    quantum=QUANTA,
    engines=st.integers(2, 4),
    loses=st.booleans(),
)
def test_clients_with_work_everywhere_are_served_within_the_bound(groups, choices, quantum, engines, loses):
    """2|W|(U+Q) over every span of time, whatever they ask and whatever the engines' order is; also after a loss."""
    cluster = Cluster("d2lpm", quantum, engines)
    endless = {name: itertools.cycle(asked) for name, asked in zip("fg", groups, strict=True)}
    chosen = itertools.cycle(choices)
    bound = 2 * engines * (PREFIX + OWN + quantum)
    for name in "fg":
        cluster.dispatch(group(name, *next(endless[name])))  # so that neither is alone, and may do as it likes
    for phase in range(2):
        ahead = []
        for _ in range(60):
            for name in "fg":
                for _ in range(400):
                    if cluster.waits_everywhere(name):
                        break
                    cluster.dispatch(group(name, *next(endless[name])))
                else:
                    raise AssertionError(f"{name} is kept from an engine")
            for engine in cluster.engines:
                cluster.serve(engine, next(chosen))
            ahead.append(cluster.service["f"] - cluster.service["g"])
        assert max(ahead) - min(ahead) <= bound
        if loses and phase == 0:
            cluster.lose("e0")


def served(policy: str) -> dict[str, int]:
    """Of two clients that always have 200 rows under way on four engines: one asks one prefix, the other many."""
    cluster = Cluster(policy, 500, 4)
    turn = 0
    for _ in range(400):
        for name in "fg":
            while sum(len(engine.queues[name]) for engine in cluster.engines.values()) < 200:
                turn += 1
                prefix = 100 if name == "f" else turn % 16
                path = Block(1, 20), Block(prefix, 100)
                cluster.dispatch(PrefixGroup(client=name, path=path, rows=10, own_tokens=20, output_tokens=0))
        for engine in cluster.engines:
            cluster.serve(engine, 0)
    return cluster.service


def test_a_client_with_one_prefix_is_not_left_on_one_engine():
    """It gets half of all engines, where routing by prefix alone leaves it half of one."""
    fair, by_prefix = served("d2lpm"), served("prefix")
    assert 0.8 < fair["f"] / fair["g"] < 1.25
    assert by_prefix["f"] / by_prefix["g"] < 0.35
