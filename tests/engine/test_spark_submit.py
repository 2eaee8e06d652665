"""The job of sql_examples under a real spark-submit: any table in, a labelled table out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.spark, pytest.mark.model]


def test_the_sentiment_job_labels_a_table(tmp_path: Path) -> None:
    reviews = [f"{word} film, I {verb} it." for word, verb in (("A wonderful", "loved"), ("A terrible", "hated"))]
    table = pd.DataFrame({"id": range(7), "review": [*reviews * 3, None]})
    table.to_parquet(tmp_path / "reviews.parquet")
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(tmp_path),
    }
    environment.pop("PYSPARK_PYTHON", None)
    command = [str(binaries / "spark-submit"), "--master", "local[2]", "--conf", "spark.ui.enabled=false"]
    command += [str(ROOT / "sql_examples" / "sentiment_job.py"), "--input", "reviews.parquet", "--output", "labelled"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    labelled = pd.read_parquet(tmp_path / "labelled").set_index("id")["sentiment"]
    assert list(labelled.sort_index()[:6]) == ["positive", "negative"] * 3
    assert labelled[6] is None
    assert "7 rows" in done.stdout
    assert "1 NULL without a call" in done.stdout
