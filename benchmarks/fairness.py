"""Fairness among clients of one engine and of many: the experiments of the VTC, DLPM and D2LPM papers.

    .venv/bin/python benchmarks/fairness.py                               all parts, simulated: about ten minutes
    .venv/bin/python benchmarks/fairness.py --part papers --engine real   the demo model on the CPU: about half an hour
    .venv/bin/python benchmarks/fairness.py --part papers --only "overloaded pair" --seconds 60
    .venv/bin/python benchmarks/write_fairness.py                         puts the tables into docs/fair-queries.md

papers     who gets what, and at what cost, under FCFS, LPM, VTC and DLPM (arXiv 2401.00588, arXiv 2501.14312)
quantum    what DLPM's quantum trades
routing    8 to 64 simulated engines under D2LPM, prefix-only, least-loaded and round-robin routing
processes  2 and 4 real engine processes under the same (with --engine real)

The simulator runs the product's scheduler, cache and router; only the model's time comes from fairness_cost.json.
With ``--engine real`` each step is run by the demo model and timed; between steps the clock stands still.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fairness_processes
import fairness_report
import fairness_routing
from cpu_engine import ROOT, revision, words
from fairness_cost import fitted
from fairness_engine import SCHEDULERS, Clock, Real, Shape
from fairness_load import EXPERIMENTS
from fairness_run import Outcome, run
from machine import this_machine

SHAPE = Shape(pages=6_000, page_size=1, batch_tokens=256, running_rows=32, quantum=256)
SECONDS = {"sim": 1_200.0, "real": 60.0}
QUANTA = (256, 512, 1_024, 2_048, 4_096, 8_192)
PARTS = ("papers", "quantum", "routing", "processes")


def path_of(part: str, engine: str) -> Path:
    """Where the run of a part is kept."""
    name = f"fairness_{part}" + ("_real" if part == "papers" and engine == "real" else "")
    return ROOT / "artifacts" / f"{name}.json"


class DemoModel:
    """The real engine's model; each experiment gets an empty cache over the same K/V pool."""

    def __init__(self, threads: int) -> None:
        from spark_llm.engine.config import EngineSpec
        from spark_llm.engine.loading import load_engine

        self.threads = threads
        spec = EngineSpec(dtype="float32", threads=threads, kv_cache_memory=1 << 30)
        self.engine = load_engine(spec, text=False)
        if self.engine.scheduler.cache.pool.total < SHAPE.pages:
            raise RuntimeError(f"the K/V pool has {self.engine.scheduler.cache.pool.total} pages, not {SHAPE.pages}")

    def clock(self) -> Clock:
        return Real(lambda plan: self.engine.runner.launch(plan).tokens(), self.threads)


def measure_papers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every experiment under every scheduler."""
    cost, real = fitted(), DemoModel(arguments.threads).clock if arguments.engine == "real" else None
    seconds = arguments.seconds or SECONDS[arguments.engine]
    outcomes = []
    for experiment in EXPERIMENTS:
        if arguments.only and experiment.name not in arguments.only:
            continue
        outcomes += [told(run(experiment, name, SHAPE, cost, seconds, real)) for name in SCHEDULERS]
    return {"outcomes": [asdict(outcome) for outcome in outcomes], "shape": asdict(SHAPE), "cost": asdict(cost)}


def measure_quantum(arguments: argparse.Namespace) -> dict[str, Any]:
    """DLPM with quanta from less than a prefix to all that a client asks in minutes; LPM and VTC are its ends."""
    cost, seconds = fitted(), arguments.seconds or SECONDS["sim"]
    outcomes, quanta = [], []
    for experiment in EXPERIMENTS:
        if experiment.name not in (*fairness_report.PREFIX_HEAVY, "27 clients"):
            continue
        for scheduler, quantum in (("vtc", 0), *(("dlpm", quantum) for quantum in QUANTA), ("lpm", 0)):
            shape = Shape(**asdict(SHAPE) | {"quantum": quantum or SHAPE.quantum})
            outcomes.append(told(run(experiment, scheduler, shape, cost, seconds)))
            quanta.append(quantum)
    return {"outcomes": [asdict(outcome) for outcome in outcomes], "quanta": quanta, "cost": asdict(cost)}


def told(outcome: Outcome) -> Outcome:
    print(f"  {outcome.experiment}, {outcome.scheduler}: {outcome.tokens:,.0f} tokens/s", file=sys.stderr)
    return outcome


MEASURE: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "papers": measure_papers,
    "quantum": measure_quantum,
    "routing": fairness_routing.measure,
    "processes": fairness_processes.measure,
}
REPORT: dict[str, Callable[[dict[str, Any]], str]] = {
    "papers": fairness_report.papers,
    "quantum": fairness_report.quantum,
    "routing": fairness_routing.report,
    "processes": fairness_processes.report,
}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=words, help=f"of {','.join(PARTS)} (default: those of the engine)")
    parser.add_argument("--engine", choices=("sim", "real"), default="sim")
    parser.add_argument("--only", type=words, default=[], help="experiments of papers, by name")
    parser.add_argument("--seconds", type=float, default=0.0, help="of each experiment, by the engine's clock")
    parser.add_argument("--engines", type=lambda text: [int(n) for n in text.split(",")], help="of routing, processes")
    parser.add_argument("--rows", type=int, default=0, help="of each query of routing and processes")
    parser.add_argument("--threads", type=int, default=1, help="of the real engine, or of each process")
    arguments = parser.parse_args(given)
    usual = ["papers", "processes"] if arguments.engine == "real" else ["papers", "quantum", "routing"]
    parts = arguments.part or usual
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--part: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for part in parts:
        started = time.perf_counter()
        record = {
            "machine": asdict(this_machine()),
            "date": time.strftime("%Y-%m-%d"),
            "revision": revision(),
            "engine": arguments.engine,
            **MEASURE[part](arguments),
        }
        out = path_of(part, arguments.engine)
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(record))
        print(f"\n{part}\n{REPORT[part](record)}\n")
        print(f"written: {out.relative_to(ROOT)} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
