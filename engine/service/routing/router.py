"""The router: knows the engines, what each has under way and what it holds, and asks a policy where rows go.

Pure bookkeeping: no sockets, no threads (whoever shares it between threads locks it), no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from spark_llm.engine.request import is_weight
from spark_llm.engine.service.routing.fleet import Fleet
from spark_llm.engine.service.routing.group import OUTPUT_WEIGHT, PrefixGroup
from spark_llm.engine.service.routing.holdings import Holdings
from spark_llm.engine.service.routing.policies import POLICIES, Part

_MAX_BLOCKS = 262_144  # prefixes that are remembered, about 50 MB


class Share(NamedTuple):
    """``group.rows`` rows of a group that ``engine`` is to answer. id: by which their end is told."""

    id: int
    engine: str
    group: PrefixGroup


class Queued(NamedTuple):
    """What an engine has under way. service: tokens of service that are left of it, as estimated."""

    rows: int
    service: float


@dataclass(slots=True)
class _Open:
    """A share whose rows are not all done. counted: the policy knows of it."""

    share: Share
    part: Part
    left: int
    counted: bool


@dataclass(slots=True)
class _Engine:
    name: str
    number: int
    speed: float
    rows: int = 0


class Router:
    """Spreads prefix groups over engines.

    A caller dispatches a group, sends the rows of each share to its engine, in their order, and tells which are done.
    Engines come and go. With one engine nothing but its open rows is kept.

    policy: a name of POLICIES. quantum: tokens of service that a client of weight 1 may send to one engine ahead of
    others; a few steps of an engine are a good size. Small: clients are spread evenly; large: prefixes stay together.
    """

    def __init__(self, policy: str = "d2lpm", quantum: float = 16_384, max_blocks: int = _MAX_BLOCKS) -> None:
        if policy not in POLICIES:
            raise ValueError(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
        self.policy = POLICIES[policy](quantum)
        self.holdings = Holdings(max_blocks)
        self._engines: dict[str, _Engine] = {}
        self._names: dict[int, _Engine] = {}  # by number
        self._fleet = Fleet()
        self._open: dict[int, _Open] = {}
        self._last_id = 0

    @property
    def engines(self) -> list[str]:
        """Those that are there, in the order in which they came."""
        return list(self._engines)

    def queued(self) -> dict[str, Queued]:
        """What each engine has under way."""
        return {
            name: Queued(engine.rows, float(self._fleet.loads[engine.number]) * engine.speed)
            for name, engine in self._engines.items()
        }

    def engine_added(self, engine: str, speed: float = 1.0) -> None:
        """An engine can be used. speed: relative to others. ValueError: the name is taken, or the speed not above 0."""
        if engine in self._engines or speed <= 0:
            raise ValueError(f"engine {engine} is known" if engine in self._engines else f"a speed of {speed}")
        number = self._fleet.add(speed)
        self._engines[engine] = self._names[number] = _Engine(engine, number, speed)
        self.policy.engine_added(number)

    def engine_lost(self, engine: str) -> list[Share]:
        """The engine is gone, or is not to be used any more; what is not done of its shares, to be dispatched anew.

        Later notices about these shares are ignored. An unknown engine has no shares.
        """
        lost = self._engines.pop(engine, None)
        if lost is None:
            return []
        shares = [found for found in self._open.values() if found.share.engine == engine]
        for found in shares:
            del self._open[found.share.id]
            if found.counted:
                self.policy.settle(found.part, found.share.group.client, found.left, 0.0)
        self.holdings.forget(lost.number)
        self._fleet.remove(lost.number)
        del self._names[lost.number]
        return [
            found.share._replace(group=msgspec.structs.replace(found.share.group, rows=found.left)) for found in shares
        ]

    def dispatch(self, group: PrefixGroup) -> list[Share]:
        """Where the group's rows go: the first rows to the first share.

        LookupError: there is no engine. ValueError: the weight is none (see is_weight).
        """
        if not self._engines:
            raise LookupError("no engine")
        if not is_weight(group.weight):
            raise ValueError(f"a weight of {group.weight}")
        if group.rows < 1:
            return []
        if len(self._engines) == 1:
            (only,) = self._engines.values()
            work = group.rows * group.row_cost + sum(block.tokens for block in group.path)
            return [self._send(group, only, Part(only.number, group.rows, work), counted=False)]
        missing = self.holdings.missing(group.path, self._fleet.mask, len(self._fleet))
        parts = self.policy.place(group, missing, self._fleet)
        for part in parts:
            self.holdings.add(group.path, part.engine)
        return [self._send(group, self._names[part.engine], part, counted=True) for part in parts]

    def finished(self, share: int, rows: int, computed_tokens: int, output_tokens: int) -> None:
        """``rows`` more rows of a share are done, for good or ill: what they cost in all. An unknown share is ignored.

        A row that was cancelled or answered without being computed costs nothing.
        """
        found = self._open.get(share)
        if found is None:
            return
        rows = min(rows, found.left)
        found.left -= rows
        engine = self._engines[found.share.engine]
        engine.rows -= rows
        left = float(self._fleet.loads[engine.number]) - found.part.work * rows / found.part.rows / engine.speed
        self._fleet.loads[engine.number] = max(0.0, left) if engine.rows else 0.0  # no dust of rounding
        if found.counted and rows:
            service = computed_tokens + OUTPUT_WEIGHT * output_tokens
            self.policy.settle(found.part, found.share.group.client, rows, service)
        if not found.left:
            del self._open[share]

    def evicted(self, engine: str, hashes: Iterable[int]) -> None:
        """The engine holds these prefixes no more. Told when it suits: a late word costs a miss, or a hit unseen."""
        known = self._engines.get(engine)
        if known is not None:
            self.holdings.remove(hashes, known.number)

    def _send(self, group: PrefixGroup, engine: _Engine, part: Part, *, counted: bool) -> Share:
        self._last_id += 1
        if part.rows != group.rows:
            group = msgspec.structs.replace(group, rows=part.rows)
        share = Share(self._last_id, engine.name, group)
        self._open[share.id] = _Open(share, part, part.rows, counted)
        engine.rows += part.rows
        self._fleet.loads[engine.number] += part.work / engine.speed
        return share
