"""What an engine step costs, as a line through what was measured: the clock of the simulator.

    .venv/bin/python benchmarks/fairness_sim.py --fit        measures the CPU engine and writes fairness_cost.json

Steps of different mixtures are run by the real engine with the demo model, and their times are fitted by least squares
over what they compute: tokens of prompts, rows that decode, and the step itself.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from spark_llm.engine.scheduling.plan import StepPlan

FITTED = Path(__file__).with_name("fairness_cost.json")


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: ``step + token * tokens of prompts + row * rows that decode``.

    error: of the fit, the median of what it is off by, as a share of the time; 0 where nothing was fitted.
    """

    step: float
    token: float
    row: float
    origin: str
    error: float = 0.0

    def of(self, plan: StepPlan) -> float:
        """Seconds that the planned step takes."""
        return self.step + self.token * (plan.num_tokens - len(plan.decode)) + self.row * len(plan.decode)


# What an 8B model in bfloat16 costs on one H100 by its roofline: 16 GB of weights at 3.3 TB/s a step, 16 GFLOP a token
# at 650 TFLOP/s, 600 keys and values of 128 KiB a decoded row. Computed, not measured.
GPU = Cost(step=5e-3, token=25e-6, row=24e-6, origin="8B on an H100 by its roofline, not measured")


def fitted() -> Cost:
    """The CPU engine with the demo model, as measured."""
    return Cost(**json.loads(FITTED.read_text("utf-8")))


def fit(threads: int = 1, repeats: int = 2) -> Cost:
    """Measure, fit and write; minutes."""
    from machine import this_machine

    from spark_llm.engine.config import EngineSpec
    from spark_llm.engine.loading import load_engine
    from spark_llm.engine.request import Request, SamplingParams

    spec = EngineSpec(dtype="float32", threads=threads, kv_cache_memory=1 << 30)
    engine = load_engine(spec, text=False)
    scheduler, runner = engine.scheduler, engine.runner
    rng = np.random.default_rng(0)
    seen: list[tuple[int, int, float]] = []
    sent = 0
    for _ in range(repeats):
        for rows, prompt, output in ((1, 32, 4), (8, 64, 12), (24, 120, 16), (64, 40, 16), (2, 700, 4), (40, 16, 24)):
            for _ in range(rows):
                tokens = rng.integers(100, 40_000, prompt, dtype=np.int32)
                scheduler.add(Request(sent, tokens, SamplingParams(max_tokens=output, ignore_eos=True)))
                sent += 1
            while len(scheduler):
                plan = scheduler.plan()
                started = time.process_time()  # which other load changes least
                sampled = runner.launch(plan).tokens()
                seconds = (time.process_time() - started) / threads
                seen.append((plan.num_tokens - len(plan.decode), len(plan.decode), seconds))
                scheduler.commit(plan, sampled, frozenset())
    cost = _line(seen, f"demo model, float32, {threads} threads, {this_machine().processor}")
    FITTED.write_text(json.dumps(asdict(cost), indent=1) + "\n", "utf-8")
    return cost


def _line(seen: list[tuple[int, int, float]], origin: str) -> Cost:
    """Least squares of relative errors, so that short steps count as much as long ones; nothing below 0."""
    measured = np.array(seen)
    seconds = measured[:, 2]
    terms = np.column_stack([np.ones(len(seen)), measured[:, 0], measured[:, 1]])
    used = np.ones(3, bool)
    found = np.zeros(3)
    while True:
        found[:] = 0
        found[used] = np.linalg.lstsq(terms[:, used] / seconds[:, None], np.ones(len(seen)), rcond=None)[0]
        if (found >= 0).all():
            break
        used &= found > 0
    error = float(np.median(np.abs(terms @ found / seconds - 1)))
    step, token, row = (float(value) for value in found)
    return Cost(step, token, row, origin, error)
