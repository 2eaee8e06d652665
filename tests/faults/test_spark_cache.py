"""Stored answers outlive executors: real Spark with two executors, one of them killed (CONTRACTS.md 22)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from spark_llm.engine.service.process import ProcessId

pytestmark = [pytest.mark.faults, pytest.mark.spark, pytest.mark.timeout(600)]
Engines = Any  # the fixture of conftest.py

_DRIVER = """
import json, os, sys
import spark_llm

model, path = sys.argv[1:]
options = {"model": model, "cache_path": path, "engine_kv_cache_memory": "64m", "engine_threads": 1}
options["optimizer_statistics_enabled"] = False
conf = {"spark.ui.enabled": "false", "spark.executor.memory": "512m"}
spark = spark_llm.session(master="local-cluster[2,1,1024]", conf=conf, **options)
spark.sparkContext.setLogLevel("OFF")
home = spark.sparkContext._jvm.System.getenv("SPARK_HOME")
print(os.path.join(home, "work", spark.sparkContext.applicationId), flush=True)
for line in sys.stdin:
    rows = spark.range(0, int(line), 1, 4).selectExpr("id", "llm('Say it.', concat('row ', id), max_tokens => 4) AS a")
    texts = {row.id: row.a for row in rows.collect()}
    report = spark_llm.last_report(spark)
    print(json.dumps([texts, report.calls, report.stored, report.failed]), flush=True)
spark.stop()
"""


def test_a_rerun_after_an_executor_was_killed_calls_nothing(engines: Engines, tmp_path: Path) -> None:
    driver = engines.python(_DRIVER, engines.model, tmp_path.as_uri())
    work = driver.stdout.readline().strip()  # where Spark's workers put what their executors print
    texts, calls, stored, failed = query(driver, 40)
    assert (calls, stored, failed) == (40, 0, 0)
    java = psutil.Process(driver.pid).children(recursive=True)
    executors = [p for p in java if p.name() == "java" and "CoarseGrainedExecutorBackend" in " ".join(p.cmdline())]
    assert len(executors) == 2
    assert committed(tmp_path) == 40, "the engines wrote their answers while the query ended"
    gone = ProcessId.of(executors[0].pid)
    executors[0].kill()
    engines.await_end(gone)
    assert query(driver, 40) == [texts, 0, 40, 0]
    driver.stdin.close()
    assert driver.wait(60) == 0
    shutil.rmtree(work)


def query(driver: Any, rows: int) -> list[Any]:
    driver.stdin.write(f"{rows}\n")
    driver.stdin.flush()
    found: list[Any] = json.loads(driver.stdout.readline())
    return found


def committed(folder: Path) -> int:
    return sum(pa.ipc.open_file(path).read_all().num_rows for path in folder.rglob("*.arrow"))
