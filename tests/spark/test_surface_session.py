"""enable() and session(): idempotent, known in new sessions and permanent views, workers with the driver's Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import config
from spark_llm.errors import LlmError

pytestmark = pytest.mark.spark


def rules(spark: SparkSession) -> int:
    return int(spark._jsparkSession.experimental().extraOptimizations().size())


def test_enable_is_idempotent(echo: SparkSession) -> None:
    for tokens in (8, 9):
        assert spark_llm.enable(echo, max_output_length=tokens) is echo
        assert config.from_session(echo).max_output_length == tokens
        assert rules(echo) == 1
        assert echo.sql("SHOW FUNCTIONS LIKE 'llm'").count() == 1
        assert echo.sql("SELECT llm('p')").count() == 1
    assert spark_llm.enable(echo) is echo
    assert config.from_session(echo).max_output_length == 9


def test_new_sessions_know_the_function_and_have_their_own_settings(echo: SparkSession) -> None:
    spark_llm.enable(echo, max_output_length=9)
    child = echo.newSession()
    plan = child.sql("SELECT llm('p', string(id)) FROM range(9)")._jdf.queryExecution().optimizedPlan().toString()
    assert "Sort [_llm0" in plan
    assert rules(child) == 1
    assert config.from_session(child).max_output_length == 64
    spark_llm.enable(child, max_output_length=3)
    assert rules(child) == 1
    assert config.from_session(child).max_output_length == 3
    assert config.from_session(echo).max_output_length == 9


def test_permanent_views(echo: SparkSession) -> None:
    echo.sql("CREATE OR REPLACE VIEW llm_view AS SELECT id, llm('p', id, max_tokens => 3) AS a FROM range(2)")
    try:
        for session in (echo, echo.newSession()):
            rows = session.sql("SELECT a FROM llm_view WHERE id = 1").collect()
            assert [json.loads(row.a)[1:] for row in rows] == [["p", "1"]]
    finally:
        echo.sql("DROP VIEW llm_view")


def test_wrong_options_set_nothing(echo: SparkSession) -> None:
    with pytest.raises(LlmError, match=r"LLM_UNKNOWN_CONFIG.*engine_dtyp\b.*engine_dtype"):
        spark_llm.enable(echo, max_output_length=5, engine_dtyp="float32")
    with pytest.raises(LlmError, match="LLM_INVALID_CONFIG"):
        spark_llm.enable(echo, **{"maxOutputLength": 5, "engine.dtype": "int4"})
    assert config.from_session(echo).max_output_length == 64


def test_settings_reach_the_tasks(echo: SparkSession) -> None:
    """As local properties, also those that Spark shows redacted."""
    echo.sql("SET spark.llm.engine.maxBatchTokens = 123")
    echo.conf.set("spark.llm.engine.idleTimeout", "90s")

    def read(batches):  # type: ignore[no-untyped-def]
        import pandas as pd

        from spark_llm import config

        for _ in batches:
            conf = config.from_task()
            spec = conf.engine_spec()
            yield pd.DataFrame({"v": [f"{conf.max_batch_tokens} {conf.idle_timeout} {conf.task_cores} {spec.model}"]})

    [row] = echo.range(1, numPartitions=1).mapInPandas(read, "v STRING").collect()
    assert row.v == "123 90.0 2 default"
    with pytest.raises(RuntimeError, match="outside of a Spark task"):
        config.from_task()


def test_threads_may_share_a_session(echo: SparkSession) -> None:
    """Each thread's analysis calls Python back on its own connection."""

    def ask(i: int) -> str:
        return str(json.loads(echo.sql(f"SELECT llm('p {i}', id) FROM range(1)").first()[0])[1])  # type: ignore[index]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [f"p {i}" for i in range(8)]


def test_a_connect_client_is_told_what_to_do() -> None:
    class FakeConnectSession:
        """Has no JVM."""

    with pytest.raises(LlmError, match="LLM_NEEDS_DRIVER"):
        spark_llm.enable(FakeConnectSession())  # type: ignore[arg-type]


SCRIPT = """
    import json, sys
    from pyspark.sql import SparkSession
    import spark_llm
    from spark_llm.errors import LlmError

    assert not {"torch", "pyspark.pandas"} & set(sys.modules)
    spark = spark_llm.session(
        "local[2]", conf={"spark.ui.enabled": "false", "spark.driver.memory": "512m"}, max_output_length=9
    )
    found = {
        "arrow": spark.conf.get("spark.sql.execution.arrow.pyspark.enabled"),
        "partitions": spark.conf.get("spark.sql.shuffle.partitions"),
        "scheduler": spark.sparkContext.getConf().get("spark.scheduler.mode"),
        "inherited": spark.newSession().conf.get("spark.llm.maxOutputLength"),
        "ui": spark.conf.get("spark.ui.enabled"),
    }

    def python(batches):
        import pandas as pd, sys
        for _ in batches:
            yield pd.DataFrame({"v": [sys.executable]})

    found["workers"] = spark.range(1).mapInPandas(python, "v STRING").first().v
    spark.sql("SELECT llm('p')")  # analysed, not run
    spark.stop()

    # The JVM lives on, and so does what was registered in it.
    other = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        other.sql("SELECT llm('p')")
    except Exception as error:
        found["not enabled"] = error.getCondition()
    spark_llm.enable(other).sql("SELECT llm('p')")
    print("FOUND", json.dumps(found))
"""


def test_a_plain_script(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT), "utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYSPARK", "SPARK"))}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.partition("FOUND")[2]) == {
        "arrow": "true",
        "partitions": "2",
        "scheduler": "FAIR",
        "inherited": "9",
        "ui": "false",
        "workers": sys.executable,
        "not enabled": "LLM_NOT_ENABLED",
    }
