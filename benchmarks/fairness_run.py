"""One experiment on one engine under one scheduler: rows arrive by the clock, steps take their time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from fairness_cost import Cost
from fairness_engine import Clock, Shape, TimedEngine, Virtual, build
from fairness_load import Experiment, Traffic
from fairness_measure import History, dlpm_bound, greatest_difference, jain, percentile

PLOTTED = 120  # points of a curve


@dataclass
class Outcome:
    """What came of it. Rates are by the second of the clock, of rows that were done within the experiment's time.

    tokens: prompt and answer tokens a second. hit_rate: of their prompts' tokens. difference: the greatest difference
    of service; bound: what dlpm promises (vtc's theorem counts whole prompts, not what is computed of them). behaved:
    seconds from arrival to answer, p50 and p99, of clients that ask less than their share; unanswered: of their rows,
    those that arrived in the first 90 % of the time and were not done at its end, as a share. curves: service over
    time by client.
    """

    experiment: str
    scheduler: str
    engine: str
    seconds: float
    rows: int
    tokens: float
    hit_rate: float
    difference: float
    bound: float | None
    jain: float | None
    behaved_p50: float | None
    behaved_p99: float | None
    unanswered: float | None
    preemptions: int
    scheduling: float
    times: list[float] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def run(
    experiment: Experiment,
    scheduler: str,
    shape: Shape,
    cost: Cost,
    seconds: float,
    real: Callable[[], Clock] | None = None,
) -> Outcome:
    """Let the experiment's rows arrive for ``seconds`` and serve them; what is not done by then does not count.

    cost: of the virtual clock, and what loads are measured by. real: makes the clock of a real engine.
    """
    traffic = Traffic(experiment.loads, seconds, cost)
    clients = len(traffic.loads)
    engine = TimedEngine(build(scheduler, shape), real() if real else Virtual(cost), clients)
    history = History([load.weight for load in traffic.loads])
    arrivals = traffic.arrivals()
    arrived: dict[int, tuple[int, float]] = {}
    waits: dict[int, list[float]] = {number: [] for number in range(clients)}
    now, sent, rows, longest = 0.0, 0, 0, 0
    following = next(arrivals, None)
    while now < seconds:
        while following is not None and following.at <= now:
            arrived[sent] = following.client, following.at
            longest = max(longest, len(following.prompt))
            engine.add(sent, following.client, traffic.clients[following.client], following.prompt, following.output)
            sent += 1
            following = next(arrivals, None)
        if not len(engine):
            if following is None:
                break
            now = following.at  # idle until somebody comes
            continue
        took, ended = engine.step()
        now += took
        if now >= seconds:
            break
        history.note(now, engine.service, engine.waiting)
        rows += len(ended)
        for row in ended:
            client, at = arrived.pop(row.id)
            waits[client].append(now - at)
    late = [client for client, at in arrived.values() if at < 0.9 * seconds and traffic.loads[client].behaved]
    behaved = [wait for client, found in waits.items() if traffic.loads[client].behaved for wait in found]
    pool = shape.pages * shape.page_size
    times, service = history.times, history.service
    picked = np.unique(np.linspace(0, len(times) - 1, PLOTTED).round().astype(int)) if len(times) else []
    return Outcome(
        experiment=experiment.name,
        scheduler=scheduler,
        engine="real" if real else "simulated",
        seconds=seconds,
        rows=rows,
        tokens=(engine.prompt_tokens + engine.output_tokens) / seconds,
        hit_rate=engine.cached_tokens / max(1, engine.prompt_tokens),
        difference=greatest_difference(service, history.waits),
        bound=dlpm_bound(longest, pool, shape.quantum) if scheduler == "dlpm" else None,
        jain=jain(service, history.waits, times),
        behaved_p50=percentile(behaved, 0.5),
        behaved_p99=percentile(behaved, 0.99),
        unanswered=len(late) / (len(late) + len(behaved)) if behaved or late else None,
        preemptions=engine.scheduler.preemptions,
        scheduling=engine.scheduling_seconds / max(1, engine.steps),
        times=[round(float(times[i]), 3) for i in picked],
        curves={load.name: [round(float(service[i, n]), 1) for i in picked] for n, load in enumerate(traffic.loads)},
    )
