"""One engine whose steps take the time that a clock says: the scheduler and the cache are the product's own.

With a ``Cost`` the clock is virtual and no model runs; with the real engine's runner each step is run and timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from fairness_cost import Cost

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.request import Client, Request, SamplingParams, TokenIds
from spark_llm.engine.scheduling.charging import OUTPUT_COST
from spark_llm.engine.scheduling.lanes import Ints
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.policies import waiting_queue
from spark_llm.engine.scheduling.scheduler import Scheduler

SCHEDULERS = ("fcfs", "lpm", "vtc", "dlpm")
NO_EOS: frozenset[int] = frozenset()
Tally = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Sizes of an engine; quantum: of DLPM, in tokens of service."""

    pages: int = 16_384
    page_size: int = 1
    batch_tokens: int = 1024
    running_rows: int = 256
    quantum: int = 1024


class Clock(Protocol):
    """Runs a step: the sampled tokens, and the seconds that it took."""

    def run(self, plan: StepPlan) -> tuple[Ints, float]: ...


class Virtual:
    """No model: tokens that mean nothing, after the time that ``cost`` says."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost

    def run(self, plan: StepPlan) -> tuple[Ints, float]:
        return np.full(plan.num_sampled, 7, np.int32), self.cost.of(plan)


class Real:
    """The demo model on the CPU. A step takes its processor time by ``threads``, which other load changes least."""

    def __init__(self, launch: Callable[[StepPlan], Ints], threads: int) -> None:
        self.launch = launch
        self.threads = threads

    def run(self, plan: StepPlan) -> tuple[Ints, float]:
        started = time.process_time()
        tokens = self.launch(plan)
        return tokens, (time.process_time() - started) / self.threads


def build(scheduler: str, shape: Shape) -> Scheduler:
    """The product's scheduler over a cache of its own."""
    return Scheduler(
        CacheManager(shape.pages, shape.page_size),
        waiting_queue(scheduler, shape.quantum),
        max_batch_tokens=shape.batch_tokens,
        max_running_rows=shape.running_rows,
    )


@dataclass(frozen=True)
class Ended:
    """A row that is done: its request, and what it computed."""

    id: int
    client: int
    computed: int
    output: int


class TimedEngine:
    """Counts, from outside, what each client was given.

    service: tokens of prompts computed for the first time, and answer tokens times their weight, by client. waiting:
    its rows that have no lane.
    """

    def __init__(self, scheduler: Scheduler, clock: Clock, clients: int) -> None:
        self.scheduler = scheduler
        self.clock = clock
        self.service: Tally = np.zeros(clients)
        self.waiting = np.zeros(clients, np.int64)
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.steps = 0
        self.busy_seconds = 0.0
        self.scheduling_seconds = 0.0  # planning and committing
        self._preemptions = 0
        self._clients: dict[int, int] = {}
        self._lane_clients = np.zeros(scheduler.lanes.count, np.int64)
        self._params: dict[int, SamplingParams] = {}

    def __len__(self) -> int:
        return len(self.scheduler)

    def add(self, id_: int, client: int, who: Client, prompt: TokenIds, output: int) -> None:
        """A row arrives whose answer will have ``output`` tokens."""
        params = self._params.get(output)
        if params is None:
            params = self._params[output] = SamplingParams(max_tokens=output, ignore_eos=True)
        self._clients[id_] = client
        self.waiting[client] += 1
        self.scheduler.add(Request(id_, prompt, params, client=who))

    def cancel(self, id_: int) -> None:
        """A row is given up; an unknown one is ignored."""
        client = self._clients.pop(id_, None)
        if client is not None:
            row = self.scheduler._rows[id_]
            self.waiting[client] -= row.lane < 0
            self.scheduler.cancel(id_)

    def step(self) -> tuple[float, list[Ended]]:
        """Plan, run and commit a step: its seconds and the rows that are done."""
        started = time.perf_counter()
        plan = self.scheduler.plan()
        planned = time.perf_counter()
        if not plan.num_rows:
            raise RuntimeError("rows wait, and nothing can be planned")
        self._count(plan)
        tokens, seconds = self.clock.run(plan)
        ran = time.perf_counter()
        done = self.scheduler.commit(plan, tokens, NO_EOS)
        self.scheduling_seconds += planned - started + time.perf_counter() - ran
        self.steps += 1
        self.busy_seconds += seconds
        ended = []
        for row in done:
            self.prompt_tokens += row.prompt_tokens
            self.cached_tokens += row.cached_tokens
            self.output_tokens += len(row.output)
            ended.append(Ended(row.id, self._clients.pop(row.id), row.computed_tokens, len(row.output)))
        return seconds, ended

    def _count(self, plan: StepPlan) -> None:
        for share in plan.rows:
            client = self._clients[share.row.request.id]
            self._lane_clients[share.lane] = client
            before = share.before
            first = share.start if before is None else max(share.start, before.high_water)
            self.service[client] += max(0, share.start + share.count - first)
            self.waiting[client] -= share.admitted
        if self.scheduler.preemptions != self._preemptions:  # rare: rows wait again
            self._preemptions = self.scheduler.preemptions
            waits = [self._clients[id_] for id_, row in self.scheduler._rows.items() if row.lane < 0]
            self.waiting[:] = np.bincount(waits, minlength=len(self.waiting))
        sampled = self._lane_clients[np.concatenate([plan.sampling, plan.decode])]
        np.add.at(self.service, sampled, OUTPUT_COST)
