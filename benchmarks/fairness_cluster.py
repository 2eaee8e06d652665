"""Many engines under one router in virtual time: the product's router, schedulers and caches, and queries that ask.

A query keeps a window of rows under way, as a task does, and dispatches the next prefix group when there is room.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from fairness_cost import Cost
from fairness_engine import Clock, Ended, Shape, TimedEngine, Virtual, build
from fairness_measure import Floats

from spark_llm.engine.prefix import KEY_BYTES
from spark_llm.engine.request import Client, TokenIds
from spark_llm.engine.service.routing import Block, PrefixGroup, Router

VOCABULARY = 40_000
NOTICE = 0.05  # seconds until the router hears of an eviction


@dataclass(frozen=True)
class Query:
    """rows in groups of about ``group`` under one prefix, chosen from ``prefixes`` of ``table`` with Zipf's ``skew``.

    Lengths in tokens. window: rows under way. start: second at which it begins. skew 0: each as likely.
    """

    name: str
    rows: int
    table: str
    prefixes: int
    instruction: int = 48
    prefix: int = 400
    own: int = 24
    output: int = 4
    group: int = 16
    window: int = 128
    skew: float = 0.0
    start: float = 0.0
    weight: float = 1.0


class Prefixes:
    """All prefixes of all tables: their tokens, and from a prompt's sort key back to them."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 5])
        self._numbers: dict[tuple[str, int, int], int] = {}
        self.tokens: list[TokenIds] = []
        self.paths: list[tuple[Block, ...]] = []
        self._instructions: dict[int, TokenIds] = {}

    def number(self, query: Query, which: int) -> int:
        """Of prefix ``which`` of the query's table. The two tokens after the instruction say it."""
        key = query.table, query.prefix, which
        if key not in self._numbers:
            number = self._numbers[key] = len(self.tokens)
            instruction = self._instructions.get(query.instruction)
            if instruction is None:
                instruction = self._rng.integers(0, VOCABULARY, query.instruction, dtype=np.int32)
                instruction[0] = query.instruction
                self._instructions[query.instruction] = instruction
            own = self._rng.integers(0, VOCABULARY, query.prefix, dtype=np.int32)
            own[:2] = divmod(number, VOCABULARY)
            self.tokens.append(np.concatenate([instruction, own]))
            self.paths.append((Block(query.instruction, query.instruction), Block(1_000_000 + number, query.prefix)))
        return self._numbers[key]

    def evicted(self, gone: Sequence[tuple[bytes, int, int]]) -> set[int]:
        """Hashes of the blocks of which these runs of tokens held some."""
        hashes = set()
        for key, first, last in gone:
            instruction = int.from_bytes(key[:KEY_BYTES], "big")
            if first < instruction:
                hashes.add(instruction)
            if last > instruction:
                at = KEY_BYTES * instruction
                high, low = (int.from_bytes(key[at + n : at + n + KEY_BYTES], "big") for n in (0, KEY_BYTES))
                number = high * VOCABULARY + low
                if first < len(self.tokens[number]):
                    hashes.add(self.paths[number][1].hash)
        return hashes


@dataclass
class Tallies:
    """What the queries got. ended: second of each one's last row. times, service: [samples], [samples, queries]."""

    ended: Floats
    waits: list[list[float]]
    times: list[float] = field(default_factory=list)
    service: list[Floats] = field(default_factory=list)
    rows: int = 0
    groups: int = 0
    shares: int = 0
    router_seconds: float = 0.0
    answer_tokens: int = 0


class Cluster:
    """Runs queries to their end, or for ``seconds``. sample: seconds between snapshots of service."""

    def __init__(
        self,
        queries: Sequence[Query],
        engines: int,
        policy: str,
        scheduler: str,
        shape: Shape,
        clock: Callable[[], Clock],
        quantum: float,
        seed: int = 0,
    ) -> None:
        self.queries = list(queries)
        self.clients = [Client(query.name, "q", query.weight) for query in queries]
        self.router = Router(policy, quantum)
        self.engines = [TimedEngine(build(scheduler, shape), clock(), len(queries)) for _ in range(engines)]
        for number in range(engines):
            self.router.engine_added(str(number))
        self.tallies = Tallies(np.full(len(queries), np.nan), [[] for _ in queries])
        self.prefixes = Prefixes(seed)
        self.now = 0.0
        self._rng = np.random.default_rng([seed, 6])
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._gone: list[list[tuple[bytes, int, int]]] = [[] for _ in self.engines]
        for engine, gone in zip(self.engines, self._gone, strict=True):
            engine.scheduler.cache.tree.on_evict = lambda *run, gone=gone: gone.append(run)  # type: ignore[misc]
        self._counted = 0
        self._busy = [False] * engines
        self._groups = [self._groups_of(number) for number in range(len(queries))]
        self._under_way = [0] * len(queries)
        self._left = [query.rows for query in queries]
        self._share_of: dict[int, tuple[int, int, float]] = {}  # row -> share, query, when it was sent
        self._sent = 0

    def run(self, seconds: float = float("inf"), sample: float = 0.0) -> Tallies:
        for number, query in enumerate(self.queries):
            self._at(query.start, lambda number=number: self._fill(number))  # type: ignore[misc]
        due = sample or float("inf")
        while self._events and self.now < seconds:
            self.now, _, act = heapq.heappop(self._events)
            while self.now >= due:
                self.tallies.times.append(due)
                self.tallies.service.append(
                    sum((engine.service for engine in self.engines), np.zeros(len(self.queries)))
                )
                due += sample
            act()
        return self.tallies

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._counted += 1
        heapq.heappush(self._events, (when, self._counted, act))

    def _groups_of(self, number: int) -> Iterator[tuple[int, int]]:
        """(prefix, rows) of the query's groups, in its order."""
        query, left = self.queries[number], self.queries[number].rows
        rng = np.random.default_rng([7, number])
        chances = 1.0 / np.arange(1, query.prefixes + 1) ** query.skew
        chances /= chances.sum()
        while left:
            which = rng.choice(query.prefixes, p=chances) if query.skew else rng.integers(query.prefixes)
            rows = min(left, int(rng.geometric(1 / query.group)))
            left -= rows
            yield self.prefixes.number(query, int(which)), rows

    def _fill(self, number: int) -> None:
        """The query dispatches groups as long as its window has room."""
        query = self.queries[number]
        while self._under_way[number] < query.window:
            group = next(self._groups[number], None)
            if group is None:
                return
            prefix, rows = group
            self._under_way[number] += rows
            started = time.perf_counter()
            shares = self.router.dispatch(
                PrefixGroup(
                    client=query.name,
                    path=self.prefixes.paths[prefix],
                    rows=rows,
                    own_tokens=query.own,
                    output_tokens=query.output,
                    weight=query.weight,
                )
            )
            self.tallies.router_seconds += time.perf_counter() - started
            self.tallies.groups += 1
            self.tallies.shares += len(shares)
            for share in shares:
                self._send(int(share.engine), share.id, share.group.rows, number, prefix)

    def _send(self, at: int, share: int, rows: int, number: int, prefix: int) -> None:
        query, engine, start = self.queries[number], self.engines[at], self.prefixes.tokens[prefix]
        own = self._rng.integers(0, VOCABULARY, (rows, query.own), dtype=np.int32)
        for row in range(rows):
            self._share_of[self._sent] = share, number, self.now
            engine.add(self._sent, number, self.clients[number], np.concatenate([start, own[row]]), query.output)
            self._sent += 1
        if not self._busy[at]:
            self._busy[at] = True
            self._at(self.now, lambda: self._step(at))

    def _step(self, at: int) -> None:
        engine = self.engines[at]
        seconds, ended = engine.step()
        hashes = self.prefixes.evicted(self._gone[at])
        self._gone[at].clear()
        self._at(self.now + seconds, lambda: self._stepped(at, ended))
        if hashes:
            self._at(self.now + seconds + NOTICE, lambda: self._timed(self.router.evicted, str(at), hashes))

    def _timed(self, call: Callable[..., None], *arguments: object) -> None:
        started = time.perf_counter()
        call(*arguments)
        self.tallies.router_seconds += time.perf_counter() - started

    def _stepped(self, at: int, ended: list[Ended]) -> None:
        """A step is over: its rows are told, windows are filled again, and the engine goes on."""
        done: dict[int, list[int]] = {}
        for row in ended:
            share, number, sent = self._share_of.pop(row.id)
            told = done.setdefault(share, [0, 0, 0])
            told[0] += 1
            told[1] += row.computed
            told[2] += row.output
            self.tallies.waits[number].append(self.now - sent)
            self._under_way[number] -= 1
            self._left[number] -= 1
            if not self._left[number]:
                self.tallies.ended[number] = self.now
        for share, (rows, computed, output) in done.items():
            self._timed(self.router.finished, share, rows, computed, output)
        self.tallies.rows += len(ended)
        for number in {row.client for row in ended}:
            self._fill(number)
        if len(self.engines[at]):
            self._step(at)
        else:
            self._busy[at] = False


def virtual(cost: Cost) -> Callable[[], Clock]:
    """Clocks for simulated engines."""
    return lambda: Virtual(cost)
