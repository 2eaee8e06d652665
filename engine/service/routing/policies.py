"""How the rows of a group are spread over engines: D2LPM, and the simpler ways that it is measured against."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple, Protocol

from spark_llm.engine.service.routing.deficits import Account, Deficits
from spark_llm.engine.service.routing.group import PrefixGroup

_PIECES = 4  # at most, of a group, for each engine

Loads = list[float]  # by engine's number: seconds' worth of rows under way, in tokens of service at speed 1


class Part(NamedTuple):
    """``rows`` rows of a group for one engine. work: tokens of service, as estimated. charged: they are on account."""

    engine: int
    rows: int
    work: float
    charged: bool = False


class Policy(Protocol):
    """Where rows go. Engines are numbers here; ``speeds`` (0: not there) and ``loads`` belong to the router."""

    def place(self, group: PrefixGroup, missing: list[int], speeds: list[float], loads: Loads) -> list[Part]:
        """Spread the group's rows over engines, each at most once. missing: tokens of its path that an engine lacks."""

    def engine_added(self, engine: int, speed: float) -> None:
        """There is a new engine; the number may have been another's, who is gone."""

    def engine_lost(self, engine: int) -> None:
        """The engine is gone."""

    def settle(self, part: Part, client: str, rows: int, service: float) -> None:
        """``rows`` rows of the part are done, or given up, and took ``service`` in truth."""


class Whole:
    """A group goes to one engine as a whole; who sent it does not matter."""

    def place(self, group: PrefixGroup, missing: list[int], speeds: list[float], loads: Loads) -> list[Part]:
        engine = self.choose([i for i, speed in enumerate(speeds) if speed], group, missing, loads)
        return [Part(engine, group.rows, missing[engine] + group.rows * group.row_cost)]

    def choose(self, engines: list[int], group: PrefixGroup, missing: list[int], loads: Loads) -> int:
        """One of ``engines``."""
        raise NotImplementedError

    def engine_added(self, engine: int, speed: float) -> None: ...

    def engine_lost(self, engine: int) -> None: ...

    def settle(self, part: Part, client: str, rows: int, service: float) -> None: ...


class RoundRobin(Whole):
    """One engine after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, engines: list[int], group: PrefixGroup, missing: list[int], loads: Loads) -> int:
        self._turn += 1
        return engines[self._turn % len(engines)]


class LeastLoaded(Whole):
    """The engine that has the least to do, whatever it holds."""

    def choose(self, engines: list[int], group: PrefixGroup, missing: list[int], loads: Loads) -> int:
        return min(engines, key=lambda engine: loads[engine])


class LongestPrefix(Whole):
    """The engine that holds most of the prefix if that is more than what is left to compute, else the least loaded one.

    Preble's rule (arXiv 2407.00023, E2), without its rebalancing: a prefix stays where it is, whatever waits there.
    """

    def choose(self, engines: list[int], group: PrefixGroup, missing: list[int], loads: Loads) -> int:
        best = min(engines, key=lambda engine: (missing[engine], loads[engine]))
        held = sum(block.tokens for block in group.path) - missing[best]
        return best if held > missing[best] + group.own_tokens else min(engines, key=lambda engine: loads[engine])


class DoubleDeficit:
    """D2LPM: of the engines with which the client has credit, the one that would have the rows done first.

    The paper takes the longest match among them, and loses to routing by prefix alone where prefixes are long and
    answers short. Here what an engine has to do counts against what it lacks of the prefix, both in tokens: a group
    leaves an engine that holds its prefix when the waiting saved is more than the prefix costs to compute again, for
    the group itself and for the rows behind it. A group is dealt out in pieces as large as its prefix, so that the
    same rule decides whether it is split.

    Credit counts while there are rows of several clients; alone, a client may use any engine as it likes.
    """

    def __init__(self, quantum: float) -> None:
        self.deficits = Deficits(quantum)

    def place(self, group: PrefixGroup, missing: list[int], speeds: list[float], loads: Loads) -> list[Part]:
        account = self.deficits.opened(group.client, group.rows, group.weight)
        contested = len(self.deficits.accounts) > 1
        piece = self._piece(group, contested, sum(map(bool, speeds)))
        placed: dict[int, Part] = {}
        loads, missing = list(loads), list(missing)  # as they will be
        queue: list[tuple[float, int, int]] = []
        left = group.rows
        while left:
            if not queue:
                queue = self._candidates(account, contested, missing, speeds, loads)
            _, lacks, engine = heapq.heappop(queue)
            rows = min(left, piece)
            left -= rows
            work = lacks + rows * group.row_cost
            before = placed.get(engine, Part(engine, 0, 0.0))
            placed[engine] = Part(engine, before.rows + rows, before.work + work, contested)
            missing[engine] = 0
            loads[engine] += work / speeds[engine]
            if contested:
                account.deficits[engine] -= work
            if not contested or account.deficits[engine] > 0:
                heapq.heappush(queue, (loads[engine], 0, engine))
        return list(placed.values())

    def engine_added(self, engine: int, speed: float) -> None:
        self.deficits.engine_added(engine, speed)

    def engine_lost(self, engine: int) -> None:
        self.deficits.engine_lost(engine)

    def settle(self, part: Part, client: str, rows: int, service: float) -> None:
        if part.charged:
            self.deficits.charge(client, part.engine, service - part.work * rows / part.rows)
        self.deficits.closed(client, rows)

    def _piece(self, group: PrefixGroup, contested: bool, engines: int) -> int:
        """Rows that are placed at a time: about as much work as their prefix, not more than a quantum of credit."""
        work = max(sum(block.tokens for block in group.path), group.rows * group.row_cost / (_PIECES * engines))
        if contested:
            work = min(work, group.weight * self.deficits.quantum)
        return max(1, int(work / group.row_cost)) if group.row_cost > 0 else group.rows

    def _candidates(
        self, account: Account, contested: bool, missing: list[int], speeds: list[float], loads: Loads
    ) -> list[tuple[float, int, int]]:
        """A heap of (what counts against the engine, what it lacks, engine)."""
        if contested:
            self.deficits.refill(account)
        queue = []
        for engine, speed in enumerate(speeds):
            if speed and not (contested and account.deficits[engine] <= 0):
                lacks = missing[engine]
                queue.append((loads[engine] + 2 * lacks / speed, lacks, engine))
        heapq.heapify(queue)
        return queue


POLICIES: dict[str, Callable[[float], Policy]] = {
    "d2lpm": DoubleDeficit,
    "prefix": lambda quantum: LongestPrefix(),
    "leastLoaded": lambda quantum: LeastLoaded(),
    "roundRobin": lambda quantum: RoundRobin(),
}
