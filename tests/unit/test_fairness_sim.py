"""The fairness benchmarks: what they measure, and that the simulator gives the same answer twice."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports a module of benchmarks/, which is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class TestMeasures:
    def test_the_greatest_difference_is_of_spans_in_which_both_wait(self, bench: Load) -> None:
        measure = bench("fairness_measure")
        service = np.array([[0, 0], [10, 0], [30, 10], [90, 10], [95, 40]], float)
        waits = np.array([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1]], bool)
        assert measure.greatest_difference(service, waits) == 20
        waits[3, 1] = True
        assert measure.greatest_difference(service, waits) == 80
        assert measure.greatest_difference(service, np.zeros_like(waits)) == 0

    def test_it_is_the_brute_force_maximum(self, bench: Load) -> None:
        measure = bench("fairness_measure")
        rng = np.random.default_rng(0)
        for _ in range(20):
            service = rng.integers(0, 9, (12, 3)).cumsum(axis=0).astype(float)
            waits = rng.random((12, 3)) < 0.8
            expected = 0.0
            for f, g in ((0, 1), (0, 2), (1, 2)):
                for start in range(12):
                    for end in range(start, 12):
                        if waits[start : end + 1, [f, g]].all():
                            ahead = (service[end] - service[start])[[f, g]]
                            expected = max(expected, abs(ahead[0] - ahead[1]))
            assert measure.greatest_difference(service, waits) == expected

    def test_jain_counts_only_clients_that_wait_throughout(self, bench: Load) -> None:
        measure = bench("fairness_measure")
        times = np.arange(21.0)
        service = np.column_stack([times, times, 7 * times])
        waits = np.ones((21, 3), bool)
        assert measure.jain(service, waits, times) == pytest.approx(81 / (3 * 51))
        waits[:, 2] = False
        assert measure.jain(service, waits, times) == pytest.approx(1)
        waits[:, 1] = False
        assert measure.jain(service, waits, times) is None


class TestOneEngine:
    def outcome(self, bench: Load, scheduler: str, name: str = "on and off") -> Any:
        run, load, engine, cost = (bench(f"fairness_{part}") for part in ("run", "load", "engine", "cost"))
        experiment = next(found for found in load.EXPERIMENTS if found.name == name)
        shape = engine.Shape(pages=3_000, batch_tokens=256, running_rows=16, quantum=256)
        clock = cost.Cost(step=0.16, token=0.004, row=0.008, origin="test")
        return run.run(experiment, scheduler, shape, clock, 45.0)

    def test_the_same_load_gives_the_same_outcome(self, bench: Load) -> None:
        first, again = self.outcome(bench, "dlpm"), self.outcome(bench, "dlpm")
        first.scheduling = again.scheduling = 0.0  # the only thing that is timed
        assert first == again
        assert json.loads(json.dumps(first.record())) == first.record()

    def test_a_client_within_its_share_waits_less_under_dlpm_than_behind_a_queue(self, bench: Load) -> None:
        fair, queued = self.outcome(bench, "dlpm"), self.outcome(bench, "fcfs")
        assert fair.behaved_p99 < 0.6 * queued.behaved_p99
        assert fair.unanswered <= queued.unanswered
        assert fair.difference <= fair.bound
        assert fair.difference < 0.5 * queued.difference
        assert fair.rows > 0.9 * queued.rows

    def test_dlpm_keeps_prefixes_where_vtc_does_not(self, bench: Load) -> None:
        fair, counted = (self.outcome(bench, scheduler, "disjoint prefixes") for scheduler in ("dlpm", "vtc"))
        assert fair.tokens > 1.5 * counted.tokens
        assert fair.hit_rate > counted.hit_rate

    def test_service_is_what_the_accounts_say(self, bench: Load) -> None:
        """The benchmark counts from outside what the scheduler charges."""
        engine_of, load, cost = bench("fairness_engine"), bench("fairness_load"), bench("fairness_cost")
        clock = engine_of.Virtual(cost.Cost(step=0.1, token=0.004, row=0.01, origin="test"))
        shape = engine_of.Shape(pages=600, batch_tokens=128, running_rows=8, quantum=128)
        engine = engine_of.TimedEngine(engine_of.build("dlpm", shape), clock, 2)
        traffic = load.Traffic(
            [load.Load("a", ((0.0, 1.0),)), load.Load("b", ((0.0, 2.0),), prefix=90)], 20.0, clock.cost
        )
        for number, row in enumerate(traffic.arrivals()):
            engine.add(number, row.client, traffic.clients[row.client], row.prompt, row.output)
        rows = len(engine)
        for _ in range(12):
            engine.step()
        status = engine.scheduler.accounts.status()
        assert [status[name].tokens for name in "ab"] == engine.service.tolist()
        assert [status[name].waiting for name in "ab"] == engine.waiting.tolist()
        engine.cancel(rows - 1)
        assert len(engine) < rows
        while len(engine):
            engine.step()
        assert not engine.waiting.any()


class TestManyEngines:
    def run(self, bench: Load, policy: str, queries: Callable[[ModuleType], list[Any]]) -> tuple[Any, Any]:
        cluster_of, cost, engine = bench("fairness_cluster"), bench("fairness_cost"), bench("fairness_engine")
        shape = engine.Shape(pages=256, page_size=16, batch_tokens=1024, running_rows=64, quantum=1024)
        cluster = cluster_of.Cluster(queries(cluster_of), 3, policy, "dlpm", shape, cluster_of.virtual(cost.GPU), 8_192)
        return cluster, cluster.run(sample=0.05)

    @pytest.mark.parametrize("policy", ["d2lpm", "prefix", "leastLoaded", "roundRobin"])
    def test_every_row_is_answered_once_and_the_router_is_told(self, bench: Load, policy: str) -> None:
        def queries(of: ModuleType) -> list[Any]:
            return [of.Query(f"q{n}", 60 + n, "t", 12, prefix=200, window=40, start=0.01 * n) for n in range(4)]

        cluster, tallies = self.run(bench, policy, queries)
        assert tallies.rows == sum(60 + n for n in range(4))
        assert all(found == (0, 0.0) for found in cluster.router.queued().values())
        assert [len(waits) for waits in tallies.waits] == [60, 61, 62, 63]
        again = self.run(bench, policy, queries)[1]
        assert again.ended.tolist() == tallies.ended.tolist()

    def test_a_hot_prefix_is_not_left_on_one_engine(self, bench: Load) -> None:
        def hot(of: ModuleType) -> list[Any]:
            return [of.Query("hot", 600, "h", 1, window=400), of.Query("other", 60, "t", 12, window=40)]

        spread, _ = self.run(bench, "d2lpm", hot)
        single, _ = self.run(bench, "prefix", hot)
        assert spread.now < 0.7 * single.now

    def test_an_engine_tells_which_prefixes_it_has_evicted(self, bench: Load) -> None:
        of = bench("fairness_cluster")
        prefixes = of.Prefixes(0)
        query = of.Query("q", 1, "t", 3, instruction=16, prefix=32)
        numbers = [prefixes.number(query, which) for which in range(3)]
        assert numbers == [0, 1, 2]
        key = bench("spark_llm.engine.prefix").sort_key(np.append(prefixes.tokens[2], np.int32(7)))
        assert prefixes.evicted([(key, 48, 49)]) == set()
        assert prefixes.evicted([(key, 16, 49)]) == {prefixes.paths[2][1].hash}
        assert prefixes.evicted([(key, 0, 48)]) == {block.hash for block in prefixes.paths[2]}


def test_the_fit_finds_a_line(bench: Load) -> None:
    cost = bench("fairness_cost")
    seen = [(tokens, rows, 0.1 + 0.004 * tokens + 0.01 * rows) for tokens in (0, 50, 200) for rows in (0, 5, 40)]
    found = cost._line(seen, "test")
    assert (found.step, found.token, found.row) == pytest.approx((0.1, 0.004, 0.01))
    assert found.error < 1e-9
    assert cost.fitted().token > 0
