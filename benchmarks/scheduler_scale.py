"""What scheduling and cache work cost: a step when 100, 10,000 or 100,000 rows of 1 or 1,000 clients wait, and a row of
a large batch.

No model runs.

    .venv/bin/python benchmarks/scheduler_scale.py [--scheduler dlpm] [--clients 1 1000] [--waiting 1000000]

Rows that are done are replaced, so the number that wait stays. Two passes over the same rows: one is timed, one
counts operations (calls of Python and C functions), which no other load on the machine can change.

The large batch is what a GPU is given: 4,096 rows of 576 tokens over 128 prefixes, all running at a time, and a second
step planned while one is in flight. Its times are processor time, the best of several passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from machine import Machine, this_machine

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.request import Client, Request, SamplingParams
from spark_llm.engine.scheduling.policies import waiting_queue
from spark_llm.engine.scheduling.scheduler import Scheduler

WAITING = (100, 10_000, 100_000)
CLIENTS = (1, 1000)
SHARED, OWN, GROUP, OUTPUT = 96, 32, 8, 4  # tokens and rows; short, so that 100,000 rows fit in memory
PAGES = 16_384  # small enough that steps evict, too
WARM_STEPS, STEPS = 50, 200
BATCH_ROWS, BATCH_PREFIXES, BATCH_SHARED, BATCH_OWN, BATCH_TOKENS = 4096, 128, 512, 64, 8192
BATCH_OUTPUT, LONG_OUTPUT = 16, 128
PASSES = 5
OUT = Path(__file__).resolve().parent.parent / "artifacts" / "scheduler_scale.json"


@dataclass(frozen=True)
class Cost:
    """Of one number of waiting rows, of so many clients. Microseconds are medians; operations are sums over all steps,
    per unit.
    """

    waiting: int
    clients: int
    add_microseconds: float
    step_microseconds: float
    tokens_a_step: float
    admitted_a_step: float
    operations_a_step: float
    operations_a_scheduled_row: float


class Queue:
    """A scheduler in which ``waiting`` rows always wait, and a stand-in for the model that emits one token a row."""

    def __init__(self, waiting: int, scheduler: str, clients: int) -> None:
        self.rng = np.random.default_rng(waiting)
        self.waiting = waiting
        self.sent = 0
        self.shared = np.empty(0, np.int32)
        self.params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
        self.scheduler = Scheduler(
            CacheManager(PAGES, 1), waiting_queue(scheduler, 1024), max_batch_tokens=1024, max_running_rows=256
        )
        self.clients = [Client(f"user {client}") for client in range(clients)]

    def fill(self) -> int:
        """Add rows until enough wait; how many were added."""
        before = self.sent
        while len(self.scheduler.waiting) < self.waiting:
            if self.sent % GROUP == 0:
                self.shared = self.rng.integers(0, 49_152, SHARED, dtype=np.int32)
            prompt = np.concatenate([self.shared, self.rng.integers(0, 49_152, OWN, dtype=np.int32)])
            client = self.clients[self.sent // GROUP % len(self.clients)]
            self.scheduler.add(Request(self.sent, prompt, self.params, client))
            self.sent += 1
        return self.sent - before

    def step(self) -> tuple[int, int, int]:
        """One step: tokens and rows that it scheduled, rows that it admitted."""
        plan = self.scheduler.plan()
        self.scheduler.commit(plan, np.full(plan.num_sampled, 7, np.int32), frozenset())
        return plan.num_tokens, plan.num_rows, sum(s.admitted for s in plan.rows)


def operations(call: Callable[[], Any]) -> tuple[int, Any]:
    """How many functions ``call`` called, all the way down, and its result."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return count, result


def measure(waiting: int, scheduler: str = "dlpm", clients: int = 1, steps: int = STEPS) -> Cost:
    """The cost of steps with ``waiting`` rows of ``clients`` waiting."""
    queue = Queue(waiting, scheduler, clients)
    started = time.perf_counter()
    added = queue.fill()
    add_seconds = (time.perf_counter() - started) / added
    for _ in range(WARM_STEPS):
        queue.step()
        queue.fill()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        queue.step()
        seconds.append(time.perf_counter() - started)
        queue.fill()
    calls = tokens = rows = admitted = 0
    for _ in range(steps):
        count, scheduled = operations(queue.step)
        calls += count
        tokens, rows, admitted = tokens + scheduled[0], rows + scheduled[1], admitted + scheduled[2]
        queue.fill()
    return Cost(
        waiting=waiting,
        clients=clients,
        add_microseconds=add_seconds * 1e6,
        step_microseconds=statistics.median(seconds) * 1e6,
        tokens_a_step=tokens / steps,
        admitted_a_step=admitted / steps,
        operations_a_step=calls / steps,
        operations_a_scheduled_row=calls / rows,
    )


@dataclass(frozen=True)
class BatchCost:
    """Of the large batch. seconds: all of it; a row: from its arrival to its answer; decoded: a row in one step."""

    page_size: int
    seconds: float
    row_microseconds: float
    decoded_microseconds: float


def measure_batch(page_size: int, scheduler: str = "dlpm") -> BatchCost:
    """Best of several passes of the large batch; decoding is measured with longer answers."""
    seconds = min(_run_batch(page_size, BATCH_OUTPUT, scheduler)[0] for _ in range(PASSES))
    decoding = min(_run_batch(page_size, LONG_OUTPUT, scheduler)[1] for _ in range(PASSES))
    return BatchCost(page_size, seconds, 1e6 * seconds / BATCH_ROWS, 1e6 * decoding)


def _run_batch(page_size: int, output: int, scheduler_name: str) -> tuple[float, float]:
    """Processor seconds of the batch, and of a row in those steps that decode every row and end none."""
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, 49_152, (BATCH_PREFIXES, BATCH_SHARED), dtype=np.int32)
    own = rng.integers(0, 49_152, (BATCH_ROWS, BATCH_OWN), dtype=np.int32)
    of_row = np.arange(BATCH_ROWS) * BATCH_PREFIXES // BATCH_ROWS
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    requests = [Request(i, np.concatenate([prefixes[of_row[i]], own[i]]), params) for i in range(BATCH_ROWS)]
    pages = BATCH_ROWS * -(-(BATCH_OWN + output + page_size) // page_size) + prefixes.size // page_size
    scheduler = Scheduler(
        CacheManager(pages, page_size),
        waiting_queue(scheduler_name, BATCH_TOKENS),
        max_batch_tokens=BATCH_TOKENS,
        max_running_rows=BATCH_ROWS,
    )
    started = time.process_time()
    decoding, rows = 0.0, 0
    for request in requests:
        scheduler.add(request)
    while len(scheduler) or scheduler.in_flight:
        before = time.process_time()
        plan = scheduler.plan()
        ended = 0
        if len(scheduler.in_flight) > 1 or not plan.num_rows:
            oldest = scheduler.in_flight[0]
            ended = len(scheduler.commit(oldest, np.full(oldest.num_sampled, 7, np.int32), {2}))
        if not plan.rows and not ended and len(plan.decode) == BATCH_ROWS:
            decoding += time.process_time() - before
            rows += BATCH_ROWS
    return time.process_time() - started, decoding / rows if rows else 0.0


def report(record: dict[str, Any]) -> str:
    """A run as text, from its JSON record."""
    costs = [Cost(**cost) for cost in record["costs"]]
    lines = [
        f"{Machine(**record['machine'])}",
        f"scheduler: {record['scheduler']}",
        "",
        "   waiting  clients  us/add  us/step  tokens/step  admitted/step  calls/step  calls/row  against the first",
    ]
    for cost in costs:
        against = cost.operations_a_scheduled_row / costs[0].operations_a_scheduled_row
        lines.append(
            f"{cost.waiting:>10,}  {cost.clients:>7,}  {cost.add_microseconds:>6.1f}  {cost.step_microseconds:>7,.0f}"
            f"  {cost.tokens_a_step:>11,.0f}  {cost.admitted_a_step:>13.1f}  {cost.operations_a_step:>10,.0f}"
            f"  {cost.operations_a_scheduled_row:>9.1f}  {against:>17.3f}"
        )
    lines += ["", "page size  seconds  us/row  us/decoded row and step"]
    for batch in (BatchCost(**cost) for cost in record["batches"]):
        lines.append(
            f"{batch.page_size:>9}  {batch.seconds:>7.3f}  {batch.row_microseconds:>6.1f}"
            f"  {batch.decoded_microseconds:>23.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="*", default=WAITING)
    parser.add_argument("--scheduler", choices=("dlpm", "vtc", "lpm", "fcfs"), default="dlpm")
    parser.add_argument("--clients", type=int, nargs="*", default=CLIENTS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    machine = asdict(this_machine())
    record = {
        "machine": machine,
        "scheduler": arguments.scheduler,
        "costs": [
            asdict(measure(waiting, arguments.scheduler, clients))
            for clients in arguments.clients
            for waiting in arguments.waiting
            if clients <= waiting
        ],
        "batches": [asdict(measure_batch(page_size, arguments.scheduler)) for page_size in (1, 16)],
    }
    print(report(record))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record))
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
