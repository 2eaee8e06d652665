"""A cluster at scale in virtual time: the product's router, schedulers and caches, without models.

    .venv/bin/python benchmarks/fairness_sim.py                        1,000 clients, 64 engines, a million requests
    .venv/bin/python benchmarks/fairness_sim.py --requests 100000 --engines 1 2 4 8 16 32 64
    .venv/bin/python benchmarks/fairness_sim.py --fit                  measures the CPU engine's steps first

Clients are queries that come one after the other, in the first tenth of the time that all of them take, with sizes that
differ by a hundred, over tables that several of them read. One process on one core; it prints what a request costs it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fairness_cost
import numpy as np
from cpu_engine import ROOT, revision
from fairness_cluster import Cluster, Query, virtual
from fairness_cost import GPU
from fairness_engine import SCHEDULERS, Shape
from fairness_report import number, origin, table
from machine import this_machine

OUT = ROOT / "artifacts" / "fairness_sim.json"
SHAPE = Shape(pages=4_096, page_size=16, batch_tokens=8_192, running_rows=512, quantum=8_192)
QUANTUM = 65_536  # of the router: eight steps
OPTIMISTIC_ROWS = 800  # a second of one engine, if it finds every prefix; for when clients come


@dataclass
class Scale:
    """A run. Seconds: virtual (``seconds``) and of the simulator. Microseconds: of processor time.

    jain: of what clients that had rows under way throughout were given in each of twenty spans, the mean.
    step_share: routing for an engine's step, by the time of a step. core_share: of one core of the driver.
    """

    engines: int
    clients: int
    requests: int
    policy: str
    scheduler: str
    seconds: float
    hit_rate: float
    jain: float
    p50: float
    p99: float
    groups: int
    router_group: float
    step_share: float
    core_share: float
    scheduling_row: float
    wall: float
    peak_gib: float


def queries(clients: int, requests: int, engines: int, seed: int = 0) -> list[Query]:
    """Sizes are log-normal; a table of 200 prefixes is read by four queries."""
    rng = np.random.default_rng([seed, 8])
    sizes = rng.lognormal(0, 1.2, clients)
    rows = np.maximum(1, (requests * sizes / sizes.sum()).astype(int))
    rows[0] += requests - rows.sum()
    span = 0.1 * requests / (OPTIMISTIC_ROWS * engines)
    starts = np.sort(rng.uniform(0, span, clients))
    return [
        Query(f"client {n}", int(rows[n]), f"t{n // 4}", 200, skew=0.6, start=float(starts[n])) for n in range(clients)
    ]


def simulate(clients: int, requests: int, engines: int, policy: str, scheduler: str) -> Scale:
    """All requests to their end."""
    started = time.perf_counter()
    asked = queries(clients, requests, engines)
    cluster = Cluster(asked, engines, policy, scheduler, SHAPE, virtual(GPU), QUANTUM)
    tallies = cluster.run(sample=requests / (OPTIMISTIC_ROWS * engines) / 40)
    waits = np.concatenate([np.array(found) for found in tallies.waits])
    steps = sum(engine.steps for engine in cluster.engines)
    busy = sum(engine.busy_seconds for engine in cluster.engines)
    return Scale(
        engines=engines,
        clients=clients,
        requests=tallies.rows,
        policy=policy,
        scheduler=scheduler,
        seconds=cluster.now,
        hit_rate=sum(e.cached_tokens for e in cluster.engines) / sum(e.prompt_tokens for e in cluster.engines),
        jain=_jain(np.array(tallies.times), np.array(tallies.service), asked, tallies.ended),
        p50=float(np.quantile(waits, 0.5)),
        p99=float(np.quantile(waits, 0.99)),
        groups=tallies.groups,
        router_group=1e6 * tallies.router_seconds / tallies.groups,
        step_share=(tallies.router_seconds / steps) / (busy / steps),
        core_share=tallies.router_seconds / cluster.now,
        scheduling_row=1e6 * sum(engine.scheduling_seconds for engine in cluster.engines) / tallies.rows,
        wall=time.perf_counter() - started,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def _jain(times: Any, service: Any, asked: list[Query], ended: Any) -> float:
    found = []
    starts = np.array([query.start for query in asked])
    edges = np.linspace(0, len(times) - 1, 21).astype(int)
    for start, end in pairwise(edges):
        there = (starts <= times[start]) & ~(ended < times[end])
        given = (service[end] - service[start])[there]
        if len(given) > 1 and given.any():
            found.append(float(given.sum() ** 2 / (len(given) * (given**2).sum())))
    return float(np.mean(found)) if found else 1.0


def report(record: dict[str, Any]) -> str:
    lines = [
        (
            f"{scale.engines:>7} {scale.policy}",
            number(scale.clients),
            number(scale.requests),
            number(scale.seconds, ",.1f"),
            number(scale.requests / scale.seconds),
            number(scale.hit_rate, ".1%"),
            number(scale.jain, ".3f"),
            number(scale.p50, ".2f"),
            number(scale.p99, ".2f"),
            number(scale.router_group),
            number(scale.step_share, ".2%"),
            number(scale.core_share, ".1%"),
            number(scale.scheduling_row),
            number(1e6 * scale.wall / scale.requests),
            number(scale.wall),
            number(scale.peak_gib, ".1f"),
        )
        for scale in (Scale(**found) for found in record["runs"])
    ]
    header = (
        "engines", "clients", "requests", "virtual s", "rows/s", "found", "Jain", "p50 s", "p99 s", "router us/group",
        "of a step", "of a core", "scheduling us/row", "simulator us/row", "wall s", "GiB",
    )  # fmt: skip
    return "\n".join([origin(record), "", table(header, lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--engines", type=int, nargs="+", default=[64])
    parser.add_argument("--policy", nargs="+", default=["d2lpm"], help="roundRobin, leastLoaded, prefix, d2lpm")
    parser.add_argument("--scheduler", default="dlpm", choices=SCHEDULERS)
    parser.add_argument("--fit", action="store_true", help="measure the CPU engine and write fairness_cost.json")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.fit:
        print(fairness_cost.fit())
        return
    runs = []
    for engines in arguments.engines:
        for policy in arguments.policy:
            runs.append(simulate(arguments.clients, arguments.requests, engines, policy, arguments.scheduler))
            print(f"  {engines} engines, {policy}: {runs[-1].wall:.0f} s", file=sys.stderr)
    record = {
        "machine": asdict(this_machine()),
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision(),
        "engine": "sim",
        "cost": asdict(GPU),
        "runs": [asdict(run) for run in runs],
    }
    print(report(record))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record))
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
