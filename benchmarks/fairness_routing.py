"""The router against its baselines on 8 to 64 simulated engines: throughput, hit rate, fairness, what routing costs.

As many queries for each engine at any size, all at once and of equal length, so that figures of sizes compare.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from fairness_cluster import Cluster, Query, Tallies, virtual
from fairness_cost import GPU
from fairness_engine import Shape
from fairness_report import ROUTER_SHARE, met, number, origin, table

POLICIES = ("roundRobin", "leastLoaded", "prefix", "d2lpm")
ENGINES = (8, 16, 32, 64)
QUERIES, ROWS = 4, 400  # for each engine, of each query
QUANTUM = 65_536  # eight steps
SHAPE = Shape(pages=4_096, page_size=16, batch_tokens=8_192, running_rows=512, quantum=8_192)


def loads(kind: str, engines: int, rows: int) -> list[Query]:
    """The queries of a kind of load; four of them ask under the prefixes of one table."""
    count = QUERIES * engines
    if kind == "long prefixes, short answers":
        return [Query(f"q{n}", rows, f"t{n // 4}", 120, skew=0.6) for n in range(count)]
    if kind == "short prefixes, long answers":
        return [Query(f"q{n}", rows, f"t{n // 4}", 120, prefix=64, own=96, output=32, skew=0.6) for n in range(count)]
    if kind == "one hot prefix":  # one query has as many rows as the others together, all under one prefix
        hot = Query("hot", rows * count, "hot", 1, window=128 * engines)
        return [hot, *(Query(f"q{n}", rows, f"t{n // 4}", 120, skew=0.6) for n in range(count))]
    raise ValueError(kind)


KINDS = ("long prefixes, short answers", "one hot prefix", "short prefixes, long answers")


@dataclass
class Case:
    """One policy on one load. Rates by the second of the virtual clock; router: of processor time.

    jain, difference: of the queries' service up to the moment when the first of them ends. late: when the last query
    ended, by when half of them had. step_share: processor time of routing for an engine's step, by the time of a step.
    core_share: of one core of the driver, for all engines.
    """

    kind: str
    engines: int
    policy: str
    rows_a_second: float
    hit_rate: float
    jain: float
    difference: float
    bound: float
    late: float
    group_microseconds: float
    step_share: float
    core_share: float
    shares_a_group: float


def case(kind: str, engines: int, policy: str, rows: int, sample: float = 0.1) -> Case:
    """Run it to the end of all queries."""
    cluster = Cluster(loads(kind, engines, rows), engines, policy, "dlpm", SHAPE, virtual(GPU), QUANTUM)
    return summary(kind, policy, cluster, cluster.run(sample=sample))


def summary(kind: str, policy: str, cluster: Cluster, tallies: Tallies) -> Case:
    """Figures of a run."""
    first = float(np.nanmin(tallies.ended))
    service = np.array([found for at, found in zip(tallies.times, tallies.service, strict=True) if at <= first])
    given = service[-1] if len(service) else np.ones(len(cluster.queries))
    steps = sum(engine.steps for engine in cluster.engines)
    prompts = sum(engine.prompt_tokens for engine in cluster.engines)
    longest = max(query.instruction + query.prefix + query.own for query in cluster.queries)
    engines = len(cluster.engines)
    busy = sum(engine.busy_seconds for engine in cluster.engines)
    return Case(
        kind=kind,
        engines=engines,
        policy=policy,
        rows_a_second=tallies.rows / cluster.now,
        hit_rate=sum(engine.cached_tokens for engine in cluster.engines) / prompts,
        jain=float(given.sum() ** 2 / (len(given) * (given**2).sum())),
        difference=float((service.max(axis=1) - service.min(axis=1)).max()) if len(service) else 0.0,
        bound=2 * engines * (longest + 2.0 * SHAPE.pages * SHAPE.page_size + QUANTUM),
        late=float(np.nanmax(tallies.ended) / np.nanmedian(tallies.ended)),
        group_microseconds=1e6 * tallies.router_seconds / tallies.groups,
        step_share=(tallies.router_seconds / steps) / (busy / steps),
        core_share=tallies.router_seconds / cluster.now,
        shares_a_group=tallies.shares / tallies.groups,
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cases = []
    for kind in KINDS:
        for engines in arguments.engines or ENGINES:
            if kind != KINDS[0] and engines not in (arguments.engines or ENGINES[:1]):
                continue
            for policy in POLICIES:
                cases.append(case(kind, engines, policy, arguments.rows or ROWS))
                print(f"  {kind}, {engines} engines, {policy}: {cases[-1].rows_a_second:,.0f} rows/s", file=sys.stderr)
    return {"cases": [asdict(found) for found in cases], "cost": asdict(GPU)}


def report(record: dict[str, Any]) -> str:
    cases = [Case(**found) for found in record["cases"]]
    lines = []
    for found in cases:
        best = max(other.rows_a_second for other in cases if _same(other, found) and other.policy != "d2lpm")
        lines.append(
            (
                f"{found.kind if found.policy == POLICIES[0] else '':30}{found.engines:>3} {found.policy}",
                number(found.rows_a_second),
                number(found.rows_a_second / best, ".2f"),
                number(found.hit_rate, ".1%"),
                number(found.jain, ".3f"),
                number(found.difference),
                number(found.late, ".2f"),
                number(found.group_microseconds),
                number(found.step_share, ".2%"),
                number(found.core_share, ".1%"),
            )
        )
    header = (
        "engines, routing",
        "rows/s",
        "of best other",
        "found",
        "Jain",
        "difference",
        "last/median",
        "us/group",
        "of a step",
        "of a core",
    )
    return "\n".join([origin(record), "", table(header, lines), "", *verdicts(cases)])


def verdicts(cases: list[Case]) -> list[str]:
    """Against prefix-only routing, the bound, and what routing may cost."""
    lines = []
    for found in cases:
        if found.policy != "d2lpm":
            continue
        prefix = next(other for other in cases if _same(other, found) and other.policy == "prefix")
        times, where = found.rows_a_second / prefix.rows_a_second, f"{found.kind}, {found.engines} engines"
        lines.append(f"{met(times >= 1)} {where}: d2lpm at {times:.2f}x the rows/s of prefix only")
        lines.append(f"{met(found.difference <= found.bound)} {where}: difference of service within 2|W|(U+Q)")
        if found.engines == max(ENGINES):
            lines.append(
                f"{met(found.step_share <= ROUTER_SHARE)} {where}: routing takes {found.step_share:.2%} of a step "
                f"(at most {ROUTER_SHARE:.0%})"
            )
    return lines


def _same(a: Case, b: Case) -> bool:
    return (a.kind, a.engines) == (b.kind, b.engines)
