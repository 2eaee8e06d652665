"""How the rows of a group are spread over engines: D2LPM, and the simpler ways that it is measured against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from spark_llm.engine.service.routing.deficits import Account, Deficits
from spark_llm.engine.service.routing.fleet import Fleet, Floats
from spark_llm.engine.service.routing.group import PrefixGroup

_PIECES = 4  # at most, of a group, for each engine
_SOON = 4  # prefixes: an engine that has less to do than to compute so many is about to idle
_IDLES, _LATE = 0.5, 1.5  # loads below and above which engines are out of line, by the mean of all
_TILT = 1e-6  # of loads that are in line, so that of equal engines the one with the least to do is taken


class Part(NamedTuple):
    """``rows`` rows of a group for one engine. work: tokens of service, as estimated. charged: they are on account."""

    engine: int
    rows: int
    work: float
    charged: bool = False


class Policy(Protocol):
    """Where rows go. Engines are numbers here; loads are the router's to change."""

    def place(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> list[Part]:
        """Spread the group's rows over engines, each at most once. missing: tokens of its path that an engine lacks."""

    def engine_added(self, engine: int) -> None:
        """There is a new engine; the number may have been another's, who is gone."""

    def settle(self, part: Part, client: str, rows: int, service: float) -> None:
        """``rows`` rows of the part are done, or given up, and took ``service`` in truth."""


class Whole(ABC):
    """A group goes to one engine as a whole; who sent it does not matter."""

    def place(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> list[Part]:
        engine = self.choose(group, missing, fleet)
        return [Part(engine, group.rows, float(missing[engine]) + group.rows * group.row_cost)]

    @abstractmethod
    def choose(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> int:
        """The number of an engine that is there."""

    def engine_added(self, engine: int) -> None: ...  # noqa: B027 (nothing is kept of engines)

    def settle(self, part: Part, client: str, rows: int, service: float) -> None: ...  # noqa: B027


class RoundRobin(Whole):
    """One engine after the other."""

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> int:
        self._turn += 1
        engines = np.flatnonzero(fleet.here)
        return int(engines[self._turn % len(engines)])


class LeastLoaded(Whole):
    """The engine that has the least to do, whatever it holds."""

    def choose(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> int:
        return int(np.where(fleet.here, fleet.loads, np.inf).argmin())


class LongestPrefix(Whole):
    """The engine that holds most of the prefix if that is more than what is left to compute, else the least loaded one.

    Preble's rule (arXiv 2407.00023, E2), without its rebalancing: a prefix stays where it is, whatever waits there.
    """

    def choose(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> int:
        loads = np.where(fleet.here, fleet.loads, np.inf)
        least = missing[fleet.here].min()
        if sum(block.tokens for block in group.path) - least > least + group.own_tokens:
            loads[missing > least] = np.inf
        return int(loads.argmin())


class DoubleDeficit:
    """D2LPM: of the engines with which the client has credit, the one where the rows cost the cluster least.

    The paper takes the longest match among them and then the shortest queue; it loses to routing by prefix alone where
    prefixes are long and answers short, as copies of prefixes fill the caches. Here what an engine lacks of the prefix
    counts twice, for the rows that wait for it and for those behind them. Its load counts only where it is out of
    line: below half the mean of all engines, if it is about to idle, and above one and a half. Between, no engine
    idles and none is late, and evening out would only copy prefixes.

    A group is dealt out in pieces as large as its prefix, so that the same rule decides whether it is split.
    Credit counts while there are rows of several clients; alone, a client may use any engine as it likes.
    """

    def __init__(self, quantum: float) -> None:
        self.deficits = Deficits(quantum)

    def place(self, group: PrefixGroup, missing: Floats, fleet: Fleet) -> list[Part]:
        account = self.deficits.opened(group.client, group.rows, group.weight, len(fleet))
        contested = len(self.deficits.accounts) > 1
        row = group.row_cost
        level = (float(fleet.loads.sum()) + group.rows * row) / fleet.power
        prefix = sum(block.tokens for block in group.path)
        piece = self._piece(group, prefix, contested, len(fleet))
        line = min(_IDLES * level, _SOON * prefix), _LATE * level
        loads = fleet.loads.copy()  # as they will be
        against = self._against(account, contested, missing, fleet, loads, line)
        parts: dict[int, Part] = {}
        left = group.rows
        while left:
            engine = int(against.argmin())
            if against[engine] == np.inf:
                against = self._against(account, contested, missing, fleet, loads, line)
                continue
            rows = min(left, piece)
            left -= rows
            work = float(missing[engine]) + rows * row
            missing[engine] = 0.0
            before = parts.get(engine)
            if before is not None:
                parts[engine] = Part(engine, before.rows + rows, before.work + work, contested)
            else:
                parts[engine] = Part(engine, rows, work, contested)
            load = loads[engine] = float(loads[engine] + work / fleet.speeds[engine])
            against[engine] = min(load, line[0]) + max(0.0, load - line[1]) + _TILT * load
            if contested:
                account.deficits[engine] -= work
                if account.deficits[engine] <= 0:
                    against[engine] = np.inf
        return list(parts.values())

    def engine_added(self, engine: int) -> None:
        self.deficits.engine_added(engine)

    def settle(self, part: Part, client: str, rows: int, service: float) -> None:
        if part.charged:
            self.deficits.charge(client, part.engine, service - part.work * rows / part.rows)
        self.deficits.closed(client, rows)

    def _piece(self, group: PrefixGroup, prefix: int, contested: bool, engines: int) -> int:
        """Rows that are placed at a time: about as much work as their prefix, not more than a quantum of credit."""
        work = max(prefix, group.rows * group.row_cost / (_PIECES * engines))
        if contested:
            work = min(work, group.weight * self.deficits.quantum)
        return max(1, int(work / group.row_cost)) if group.row_cost > 0 else group.rows

    def _against(
        self,
        account: Account,
        contested: bool,
        missing: Floats,
        fleet: Fleet,
        loads: Floats,
        line: tuple[float, float],
    ) -> Floats:
        """What counts against each engine; infinite: it is not there, or has no credit. line: loads that are in it."""
        usable = self.deficits.refill(account, fleet) if contested else fleet.here
        against = np.minimum(loads, line[0]) + np.maximum(loads - line[1], 0.0) + _TILT * loads
        against += 2 * missing / fleet.speeds
        return np.where(usable, against, np.inf)


POLICIES: dict[str, Callable[[float], Policy]] = {
    "d2lpm": DoubleDeficit,
    "prefix": lambda quantum: LongestPrefix(),
    "leastLoaded": lambda quantum: LeastLoaded(),
    "roundRobin": lambda quantum: RoundRobin(),
}
