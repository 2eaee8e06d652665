"""Who asks what, and when: the loads of the papers' experiments (VTC, arXiv 2401.00588; DLPM, arXiv 2501.14312)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from fairness_cost import Cost

from spark_llm.engine.request import Client, TokenIds

INSTRUCTION = 16  # tokens that all prompts begin with: template and system message
VOCABULARY = 40_000


@dataclass(frozen=True)
class Load:
    """One client. Lengths in tokens; a row's own part and answer vary by ``spread`` (a share) around them.

    rates: (from this share of the time on, how much), the last one to the end; 1 is what keeps one engine busy that
    finds nine of ten prefixes. prefixes: how many it asks under, ``run`` rows in a row under the same. pool: clients of
    one pool ask under the same prefixes. behaved: it asks less than its share, and should not feel the others.
    """

    name: str
    rates: tuple[tuple[float, float], ...]
    prefix: int = 160
    own: int = 40
    output: int = 8
    prefixes: int = 4
    run: int = 8
    pool: str = ""
    weight: float = 1.0
    spread: float = 0.25
    behaved: bool = False

    def seconds_a_row(self, cost: Cost) -> float:
        """What a row keeps an engine busy for that decodes 32 rows a step."""
        return cost.token * (self.own + 0.1 * self.prefix) + (cost.row + cost.step / 32) * self.output


@dataclass(frozen=True, order=True)
class Arrival:
    """A row arrives: at a second, of client number ``client``; prefix: number of its prefix among all."""

    at: float
    client: int
    number: int
    prefix: int = field(compare=False)
    prompt: TokenIds = field(compare=False)
    output: int = field(compare=False)


class Traffic:
    """The arrivals of some loads in ``seconds``, the same for whoever serves them."""

    def __init__(self, loads: Sequence[Load], seconds: float, cost: Cost, seed: int = 0) -> None:
        self.loads = tuple(loads)
        self.seconds = seconds
        self.cost = cost
        self.seed = seed
        self.clients = [Client(load.name, "q", load.weight) for load in self.loads]
        rng = np.random.default_rng([seed, 1])
        self.instruction = rng.integers(100, VOCABULARY, INSTRUCTION, dtype=np.int32)
        self._prefixes: dict[tuple[str, int, int], int] = {}
        self.prefixes: list[TokenIds] = []

    def arrivals(self) -> Iterator[Arrival]:
        """In the order of time."""
        return heapq.merge(*(self._of(number) for number in range(len(self.loads))))

    def _of(self, client: int) -> Iterator[Arrival]:
        load = self.loads[client]
        rng = np.random.default_rng([self.seed, 2, client])
        prefix = 0
        for number, at in enumerate(self._times(load, rng)):
            if number % load.run == 0:
                prefix = self._prefix(load, int(rng.integers(load.prefixes)))
            own = rng.integers(100, VOCABULARY, _around(load.own, load.spread, rng), dtype=np.int32)
            prompt = np.concatenate([self.prefixes[prefix], own])
            yield Arrival(at, client, number, prefix, prompt, _around(load.output, load.spread, rng))

    def _prefix(self, load: Load, which: int) -> int:
        key = load.pool or load.name, load.prefix, which
        if key not in self._prefixes:
            rng = np.random.default_rng([self.seed, 3, *(ord(c) for c in key[0]), load.prefix, which])
            tokens = rng.integers(100, VOCABULARY, load.prefix, dtype=np.int32)
            self._prefixes[key] = len(self.prefixes)
            self.prefixes.append(np.concatenate([self.instruction, tokens]))
        return self._prefixes[key]

    def _times(self, load: Load, rng: np.random.Generator) -> Iterator[float]:
        """Poisson arrivals at the load's rates."""
        ends = [start for start, _ in load.rates[1:]] + [1.0]
        for (start, much), end in zip(load.rates, ends, strict=True):
            now = start * self.seconds
            while much > 0:
                now += rng.exponential(load.seconds_a_row(self.cost) / much)
                if now >= end * self.seconds:
                    break
                yield now


def _around(mean: int, spread: float, rng: np.random.Generator) -> int:
    return max(1, round(mean * rng.uniform(1 - spread, 1 + spread)))


@dataclass(frozen=True)
class Experiment:
    """Clients that ask at the same time; what: a sentence for the table."""

    name: str
    what: str
    loads: tuple[Load, ...]


def _steady(much: float) -> tuple[tuple[float, float], ...]:
    return ((0.0, much),)


_ON_OFF = tuple((turn / 6, 0.4 if turn % 2 == 0 else 0.0) for turn in range(6))
_RAMP = tuple((turn / 10, 0.3 * (turn + 1)) for turn in range(10))
_LONG = Load("", (), prefix=400, own=24, output=4, run=2)  # prefixes long, answers short: the usual query


def _under(name: str, much: float, prefixes: int, pool: str = "", behaved: bool = False) -> Load:
    return replace(_LONG, name=name, rates=_steady(much), prefixes=prefixes, pool=pool, behaved=behaved)


EXPERIMENTS = (
    Experiment(
        "overloaded pair",
        "both ask more than half the engine, one twice as much as the other",
        (Load("one", _steady(1.0)), Load("two", _steady(2.0))),
    ),
    Experiment(
        "on and off",
        "one asks 0.4 of the engine every other period, the other three times the engine all the time",
        (Load("pauses", _ON_OFF, behaved=True), Load("always", _steady(3.0))),
    ),
    Experiment(
        "ramp",
        "one asks a fifth of the engine, the other more and more: from 0.3 to 3 engines' worth",
        (Load("steady", _steady(0.2), behaved=True), Load("ramp", _RAMP)),
    ),
    Experiment(
        "short and long",
        "short rows with short answers against long ones with long answers, each more than half the engine",
        (
            Load("short", _steady(1.0), prefix=40, own=16, output=3, prefixes=2),
            Load("long", _steady(1.5), prefix=240, own=120, output=24, prefixes=2),
        ),
    ),
    Experiment(
        "shared prefixes",
        "three clients under the same 40 prefixes of 400 tokens, and one that asks little",
        (_under("little", 0.05, 1, "all", behaved=True), *(_under(f"much {n}", 1.0, 40, "all") for n in range(3))),
    ),
    Experiment(
        "disjoint prefixes",
        "three clients, each under 12 prefixes of 400 tokens of its own, and one that asks little",
        (_under("little", 0.05, 1, behaved=True), *(_under(f"much {n}", 1.0, 12) for n in range(3))),
    ),
    Experiment(
        "27 clients",
        "rates fall off as in the arena trace of the VTC paper: a few clients ask most",
        tuple(Load(f"client {rank}", _steady(1.0 / rank**1.1), prefixes=3, behaved=rank > 14) for rank in range(1, 28)),
    ),
)
