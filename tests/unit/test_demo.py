"""The demo's parts that need no Spark: reading the example files, tables, the comparison that it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pyspark.sql import Row

from spark_llm.demo import examples, show
from spark_llm.demo.measure import Comparison, Measured
from spark_llm.report import Report

EXAMPLE = examples.Example("01_x", "filter", "movies", "input", "CREATE ...", "SELECT ...")


def test_there_are_the_five_kinds_of_queries() -> None:
    found = examples.read_all()
    assert [example.name for example in found] == [
        "01_filter",
        "02_projection",
        "03_two_calls",
        "04_aggregation",
        "05_rag",
    ]
    assert {example.name for example in found if example.is_aggregate} == {"04_aggregation"}
    assert all("llm(" in e.select and f"FROM {e.view}" in e.select for e in found)
    assert not any("--" in e.select for e in found)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.sql"
    path.write_text("-- Filter: no view\n-- data: movies\nSELECT 1;\n")
    with pytest.raises(ValueError, match=r"x\.sql.*CREATE OR REPLACE"):
        examples.read(path)
    with pytest.raises(FileNotFoundError, match="checkout"):
        examples.read_all(tmp_path / "nowhere")


def test_tables_stay_within_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = show.first_rows([Row(id=1, text="word " * 60, score=0.5, none=None)])
    head, row = text.splitlines()
    assert head.split() == ["id", "text", "score", "none"]
    assert row.split()[-2:] == ["0.5", "NULL"]
    assert "…" in row
    assert max(len(head), len(row)) <= 80
    assert show.first_rows([]) == "  (no rows)"


def _comparison(same: int | None) -> Comparison:
    counts = {"prompt_tokens": 1000, "cached_tokens": 800, "computed_tokens": 200}
    tokens = {"instruction_tokens": 400, "cached_instruction_tokens": 400}
    ours = Report(query="1", rows=100, calls=90, duplicates=10, seconds=5.0, **counts, **tokens)
    naive = Report(query="2", rows=10, calls=10, prompt_tokens=100, computed_tokens=100, seconds=2.0)
    return Comparison(EXAMPLE, Measured([], ours, 6.0), Measured([], naive, 3.0), 10, same, 10)


def test_a_comparison_is_per_row() -> None:
    result = _comparison(same=9)
    assert result.speedup == pytest.approx(4.0)
    text = show.comparison(result)
    lines = {name: values for name, *values in (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())}
    assert lines["duplicates folded"] == ["10", "0"]
    assert lines["prefix hit rate"] == ["80.0%", "0.0%"]
    assert lines["of data"] == ["66.7%", "0.0%"]
    assert lines["of instruction"] == ["100.0%", "0.0%"]
    assert lines["seconds a row"] == ["0.050", "0.200"]
    assert "4.0x less time a row than naively; 9 of 10 sampled result rows are the same" in text
    assert "same" not in show.comparison(_comparison(same=None))
    assert "4.0x" in show.summary([result])
    assert result.ours.as_json()["prefix_hit_rate"] == pytest.approx(0.8)
