"""Nothing outlives its executor, and a cancelled query leaves the engine: real Spark, real kills."""

from __future__ import annotations

import signal
from typing import Any

import msgspec
import psutil
import pytest

from spark_llm.engine.service.process import ProcessId

pytestmark = [pytest.mark.faults, pytest.mark.spark]
Engines = Any  # the fixture of conftest.py

_DRIVER = """
import sys
from collections.abc import Iterator
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.functions import pandas_udf

spec, header = sys.argv[1:]
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
spark.sparkContext.setLogLevel("OFF")

@pandas_udf("long")
def ask(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
    import msgspec
    import pyarrow as pa
    from spark_llm.engine.config import EngineSpec
    from spark_llm.engine.service.client import connect
    from spark_llm.engine.service.protocol import REQUEST_SCHEMA, StreamOpen, request_rows

    client = connect(msgspec.json.decode(spec, type=EngineSpec))
    with client.stream(msgspec.json.decode(header, type=StreamOpen)) as stream:
        for ids in batches:
            segments = pa.array([[f"row {i}"] for i in ids], REQUEST_SCHEMA.field("segments").type)
            stream.send(request_rows(ids, segments))
            while stream.receive() is not None:
                pass
            yield pd.Series([client.status().pid] * len(ids))

print("up", flush=True)
for line in sys.stdin:
    if line == "cancel\\n":
        spark.sparkContext.cancelAllJobs()
    else:
        import threading
        rows = spark.range(0, int(line), 1, 2).select(ask("id").alias("pid"))
        def run():
            try:
                print(sorted({row.pid for row in rows.collect()}), flush=True)
            except Exception as error:
                print(type(error).__name__, flush=True)
        threading.Thread(target=run, daemon=True).start()
"""


def test_a_cancelled_query_leaves_the_engine_and_a_killed_driver_ends_it(engines: Engines) -> None:
    header = engines.header(max_tokens=8000)
    spec = engines.spec()
    driver = engines.python(_DRIVER, *(msgspec.json.encode(value).decode() for value in (spec, header)))
    assert driver.stdout.readline() == "up\n"

    tell(driver, "40")
    status = engines.await_status(lambda status: status.streams == 2 and status.waiting + status.running > 20)
    (jvm,) = [child for child in psutil.Process(driver.pid).children() if child.name() == "java"]
    assert status.owner == jvm.pid, "both tasks share the executor's engine"
    assert len(engines.living()) == 1

    tell(driver, "cancel")
    assert driver.stdout.readline().strip().endswith(("Exception", "Error"))
    engines.await_status(lambda status: (status.streams, status.waiting, status.running) == (0, 0, 0))

    tell(driver, "40")
    engines.await_status(lambda status: status.running > 0)
    engine, java = engines.process(status), ProcessId.of(jvm.pid)
    driver.send_signal(signal.SIGKILL)
    engines.await_end(java)
    engines.await_end(engine)
    driver.wait()
    assert engines.living() == []
    assert engines.files() == set()


def tell(driver: Any, line: str) -> None:
    driver.stdin.write(line + "\n")
    driver.stdin.flush()
