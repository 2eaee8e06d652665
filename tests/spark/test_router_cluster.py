"""spark.llm.router through Spark: two executors' engines answer one query, with the answers that one would give."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.spark, pytest.mark.timeout(600)]

_DRIVER = """
import json, os, sys
import spark_llm
from spark_llm import report

model, events = sys.argv[1:]
options = {"model": model, "engine_kv_cache_memory": "64m", "engine_threads": 1, "cache_enabled": False}
options |= {"optimizer_statistics_enabled": False, "engine_dtype": "float32"}
conf = {"spark.ui.enabled": "false", "spark.executor.memory": "512m"}
conf |= {"spark.eventLog.enabled": "true", "spark.eventLog.dir": events, "spark.eventLog.compress": "false"}
spark = spark_llm.session(master="local-cluster[2,1,1024]", conf=conf, **options)
spark.sparkContext.setLogLevel("OFF")
home = spark.sparkContext._jvm.System.getenv("SPARK_HOME")
counters = report.install(spark)

def query():
    rows = spark.range(0, 48, 1, 4).selectExpr("id", "llm('Say it.', concat('group ', id div 6, repeat(' x', 30)), "
        "concat('row ', id), temperature => 1.0, seed => 7, max_tokens => 3) AS a")  # drawn: else all are the same
    return {row.id: row.a for row in rows.collect()}

told = {"local": query(), "listens": counters.coordination.server is not None}
spark.conf.set("spark.llm.router", "d2lpm")
told["d2lpm"] = query()
counts = spark_llm.last_report(spark)
told["counts"] = [counts.rows, counts.calls, counts.failed]
limited = spark.range(0, 400, 1, 4).selectExpr("id", "llm('Say it.', concat('row ', id), max_tokens => 2) AS a")
told["limited"] = limited.where("length(a) >= 0").limit(3).count()
told["limited rows"] = spark_llm.last_report(spark).calls
cost = counters.coordination.server.cost
told["cost"] = [cost.requests, cost.groups, cost.rows, cost.seconds]
told["key"] = counters.sink.cluster.key
told["work"] = os.path.join(home, "work", spark.sparkContext.applicationId)
spark.stop()
print(json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def told(random_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a driver with two executors saw."""
    folder: Path = tmp_path_factory.mktemp("router")
    tmp = tempfile.mkdtemp()  # pytest's own folders have names too long for sockets
    environment = os.environ | {"TMPDIR": tmp, "PYSPARK_PYTHON": sys.executable}
    environment.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    (folder / "events").mkdir()
    command = [sys.executable, "-c", _DRIVER, random_model, str(folder / "events")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=500, check=False)
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    found["events"] = "".join(path.read_text() for path in (folder / "events").rglob("*") if path.is_file())
    logs = [path for path in Path(found["work"]).rglob("*") if path.name in ("stderr", "stdout")]
    found["logs"] = "".join(path.read_text("utf-8", "replace") for path in logs)
    yield found
    shutil.rmtree(found["work"], ignore_errors=True)
    shutil.rmtree(tmp, ignore_errors=True)


def test_answers_are_those_of_each_executors_own_engine(told: dict[str, Any]) -> None:
    assert len(told["local"]) == 48
    assert len(set(told["local"].values())) > 24, "which row an answer belongs to can be seen"
    assert not told["listens"], "with router=local the driver does not listen"
    assert told["d2lpm"] == told["local"]
    assert told["counts"] == [48, 48, 0]
    requests, groups, rows, seconds = told["cost"]
    assert 0 < requests <= groups <= rows
    assert seconds / groups < 0.01


def test_a_limit_holds_over_both_executors(told: dict[str, Any]) -> None:
    assert told["limited"] == 3
    assert told["limited rows"] < 100


def test_the_key_is_in_no_log_and_no_event(told: dict[str, Any]) -> None:
    assert "spark.llm.router" in told["events"]
    assert told["key"] not in told["events"]
    assert told["key"] not in told["logs"]
