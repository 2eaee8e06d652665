"""The parts of the prefix order benchmark: counting hits, measuring orders and renderings, from records to verdicts."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark_llm.datasets import paper

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12)
FIXTURE_IS_SHARED = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/, which is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def prompts_of(hits: ModuleType, rows: list[list[int]], instruction: int = 1) -> Any:
    ids = [np.array(row, np.int32) for row in rows]
    return hits.Prompts(ids, np.array([min(instruction, len(row)) for row in rows], np.int64))


def longest(row: list[int], others: list[list[int]]) -> int:
    """Brute force: how much of ``row``, but for its last token, some other row begins with."""
    return max((n for n in range(len(row)) if any(other[:n] == row[:n] for other in others)), default=0)


class TestHits:
    @FIXTURE_IS_SHARED
    @given(rows=PROMPTS, seed=st.integers(0, 5))
    def test_a_cache_without_bound_finds_the_same_in_any_order(self, bench, rows, seed):
        hits = bench("prefix_order_hits")
        prompts = prompts_of(hits, rows)
        found = hits.unbounded(prompts)
        assert hits.unbounded(prompts.take(np.random.default_rng(seed).permutation(len(rows)))) == found
        ordered = sorted(rows)
        assert found.found == sum(longest(row, ordered[:place]) for place, row in enumerate(ordered))
        assert found.tokens == sum(map(len, rows))

    @FIXTURE_IS_SHARED
    @given(rows=PROMPTS, room=st.integers(1, 40))
    def test_a_bounded_cache_holds_the_last_prompts_that_fit(self, bench, rows, room):
        hits = bench("prefix_order_hits")
        found, held = 0, []
        for row in rows:
            found += longest(row, held)
            held.append(row)
            while sum(map(len, held)) > room and len(held) > 1:
                held.pop(0)
        assert hits.bounded(prompts_of(hits, rows), room).found == found

    def test_a_bound_of_one_prompt_is_the_row_before(self, bench):
        hits = bench("prefix_order_hits")
        prompts = prompts_of(hits, [[1, 2, 3], [1, 2, 4], [5, 6, 7], [1, 2, 3]])
        assert hits.bounded(prompts, 1) == hits.neighbours(prompts)
        assert hits.neighbours(prompts).found == 2
        assert hits.bounded(prompts, 100).found == 2 + 0 + 2

    def test_instruction_counts_apart_and_the_last_token_is_always_computed(self, bench):
        hits = bench("prefix_order_hits")
        found = hits.neighbours(prompts_of(hits, [[1, 2, 3, 4]] * 3, instruction=2))
        assert (found.found, found.instruction_found) == (6, 4)
        assert (found.rate, found.data_rate, found.instruction_rate) == (6 / 12, 2 / 6, 4 / 6)
        twice = hits.total([found, found])
        assert (twice.rows, twice.found, twice.rate) == (6, 12, found.rate)

    def test_columns_are_as_spark_hands_them_to_the_udf(self, bench):
        frame = pd.DataFrame({"a": ["x", None], "b": [1, 20], "c": [0.5, 3.0], "d": [True, False]})
        columns, specs = bench("prefix_order_hits").text_columns(frame)
        assert [column.to_pylist() for column in columns] == [
            ["x", None],
            ["1", "20"],
            ["0.5", "3.0"],
            ["true", "false"],
        ]
        assert [(spec.name, spec.json) for spec in specs] == [("a", False), ("b", True), ("c", True), ("d", True)]


@pytest.mark.model
class TestTables:
    def test_orders_change_only_the_order_and_ours_finds_at_least_as_much(self, bench):
        solver, hits = bench("prefix_order_solver"), bench("prefix_order_hits")
        pipeline = hits.demo_pipeline()
        cases = solver.run(pipeline, ["beer"], 300, None, {"beer": 200}, lambda line: None)
        whole = {case.order: case for case in cases if case.rows == 300}
        assert set(whole) == {solver.SHUFFLED, solver.WRITTEN, solver.FIXED, solver.SOLVED, solver.TABLE}
        assert {(case.order, case.rows) for case in cases} >= {(solver.GGR, 200), (solver.SOLVED, 200)}
        assert len({case.hits.tokens for case in whole.values()}) == 1
        written, fixed, ours = (whole[order].hits for order in (solver.WRITTEN, solver.FIXED, solver.SOLVED))
        assert written.found < fixed.found <= ours.found
        assert whole[solver.SHUFFLED].hits == written
        text = solver.report({"solver": [vars(c) | {"hits": vars(c.hits), "held": vars(c.held)} for c in cases]})
        assert "ours, solve less GGR" in text
        assert len(re.findall(r"^beer ", text, re.MULTILINE)) == len(cases)

    def test_prompts_are_those_of_the_whole_text(self, bench):
        hits = bench("prefix_order_hits")
        pipeline = hits.demo_pipeline()
        frame = paper.table("bird", 3)
        window = hits.with_fields(hits.rendered(frame, "Is it? Yes or no."), np.array([3, 1, 0, 2]))
        prompts = hits.encode(pipeline, window)
        for row, ids in enumerate(prompts.ids):
            message = "".join(window.texts(row)).removesuffix("\n")
            text = pipeline.frame(None).render(message)
            assert [name for name in re.findall(r"^(\w+): ", message, re.MULTILINE) if name in frame.columns] == [
                "Text",
                "PostDate",
                "Body",
                "PostId",
            ]
            assert pipeline.decode([ids.tolist()])[0] in text.replace("<|im_start|>", "").replace("<|im_end|>", "")
        assert (prompts.instruction > 10).all()

    def test_the_rendering_in_use_is_that_of_prompts(self, bench):
        renderings, hits = bench("prefix_order_renderings"), bench("prefix_order_hits")
        frame = paper.table("movies", 40)
        (in_use, way), *_ = renderings.RENDERINGS.items()
        assert in_use.startswith("in use")
        columns, specs = hits.text_columns(frame)
        texts = [renderings.field_texts(column, spec, way) for column, spec in zip(columns, specs, strict=True)]
        window = hits.rendered(frame, "Say.")
        for row in range(40):
            assert window.texts(row)[1:] == [f"{column[row]}\n" for column in texts]
        costs = renderings.measure(["movies"], 60, None)
        assert [cost.rendering for cost in costs] == list(renderings.RENDERINGS)
        assert all(0 < cost.computed < cost.tokens for cost in costs)
        assert "1.000" in renderings.report({"rendering": [vars(cost) for cost in costs]})


class TestVerdicts:
    def query(self, bench, name, way, seconds, computed):
        queries, hits = bench("prefix_order_queries"), bench("prefix_order_hits")
        found = hits.Hits(8, 1_000, 100, 1_000 - computed, 90)
        return queries.Case(name, way, 8, 8, 0, seconds + 1, seconds, computed, 16, found, ["1"])

    def test_ratios_of_queries_and_the_median_of_filters(self, bench):
        queries = bench("prefix_order_queries")
        cases = []
        for name, times in (("T1 movies", 3), ("T1 beer", 5), ("T1 bird", 9), ("T2 beer", 50)):
            cases.append(self.query(bench, name, queries.NONE, 10.0 * times, 100 * times))
            cases.append(self.query(bench, name, queries.STORED, 10.0, 300))
            cases.append(self.query(bench, name, queries.OURS, 10.0, 100))
        ratios = queries.ratios(cases, queries.NONE)
        assert [(r.call_seconds, r.tokens) for r in ratios.values()] == [(3, 3), (5, 5), (9, 9), (50, 50)]
        lines = queries.targets(cases)
        assert "met   filter queries, median: tokens computed of no cache against ours: 5.00 (at least 3.00)" in lines
        assert [line[:4] for line in lines if "seconds of calls of cache" in line] == ["MISS"]
        record = {"queries": queries.as_record(cases)}
        assert queries.from_record(record) == cases
        assert "times less than" in queries.report(record)

    def test_partitions_are_judged_against_one(self, bench):
        spark, hits = bench("prefix_order_spark"), bench("prefix_order_hits")

        def case(plan: str, partitions: int, found: int) -> Any:
            return spark.Case("beer", plan, partitions, 10, 10, 1.0, hits.Hits(10, 1_000, 100, found, 90))

        cases = [case(spark.OURS, 1, 700), case(spark.OURS, 8, 690), case(spark.OURS, 200, 600)]
        lines = spark.targets([*cases, case(spark.RANDOM, 200, 300)])
        assert [line[:4] for line in lines] == ["met ", "MISS"]
        assert "10.00 (under 2.00)" in lines[1]

    def test_every_part_has_its_place_in_the_documents(self, bench):
        main, page = bench("prefix_order"), (BENCHMARKS.parent / "docs" / "prefix-order.md").read_text("utf-8")
        assert {f"prefix_order_{part}" for part in main.MEASURE} <= set(re.findall(r"<!-- (\w+) -->", page))
        assert set(main.REPORT) == set(main.MEASURE)

    def test_out_needs_one_part(self, bench, capsys):
        with pytest.raises(SystemExit):
            bench("prefix_order").parse(["--out", "x.json"])
        assert "--out needs one --part" in capsys.readouterr().err
        assert bench("prefix_order").parse(["--part", "spark"]).part == ["spark"]
