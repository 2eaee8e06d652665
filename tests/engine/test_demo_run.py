"""The demo itself, on a small query: real Spark, the packaged model, our run and the naive one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.model]

QUERY = """-- Filter: a small one
-- data: movies

CREATE OR REPLACE TEMPORARY VIEW input AS
SELECT r.review_id, m.title, m.plot, r.quote FROM reviews AS r JOIN movies AS m USING (movie_id)
WHERE m.title = 'Frida' ORDER BY r.review_id LIMIT 16;

SELECT review_id, quote, llm('Is the review good?', plot, quote, max_tokens => 2) AS answer FROM input;
"""


def test_a_run_reports_both_ways_and_equal_answers(tmp_path: Path) -> None:
    (tmp_path / "01_small.sql").write_text(QUERY)
    command = [sys.executable, "-P", "-m", "spark_llm.demo", "--folder", str(tmp_path), "--json", str(tmp_path / "out")]
    environment = os.environ | {"SPARK_LOCAL_DIRS": str(tmp_path), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    query = json.loads((tmp_path / "out").read_text())["queries"]["01_small"]
    ours, naive = query["ours"], query["naive"]
    assert (ours["rows"], ours["calls"], ours["failed"]) == (16, 16, 0)
    assert (naive["rows"], naive["calls"], naive["cached_tokens"]) == (12, 12, 0)
    assert ours["prefix_hit_rate"] > 0.5
    assert ours["computed_tokens"] + ours["cached_tokens"] == ours["prompt_tokens"]
    assert (query["same"], query["compared"]) == (12, 12)
    assert "ArrowEvalPython" in done.stdout
    assert "prefix hit rate" in done.stdout
    assert "llm query" in done.stderr  # the progress line; on a fast machine nothing comes after "waiting"
