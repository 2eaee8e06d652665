"""``enable()`` puts llm() into a live Spark session; ``session()`` builds a session that just works."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_llm import config

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_POOLS = "spark.scheduler.allocation.file"  # the pools of the fair scheduler


def enable(spark: SparkSession, **options: Any) -> SparkSession:
    """Make ``llm(...)`` callable in a session, in SQL and as ``spark_llm.functions.llm``; returns the session.

    May be called any number of times, with other options each time. Sessions made by ``spark.newSession()`` know the
    function, too, with the configuration that Spark was started with. ``options`` are ``spark.llm.*`` keys
    (docs/configuration.md): ``engine_dtype="float32"`` sets ``spark.llm.engine.dtype`` of this session.

    Raises LLM_UNKNOWN_CONFIG and LLM_INVALID_CONFIG (nothing is set then), LLM_NEEDS_DRIVER for a Connect client.
    """
    from spark_llm import progress
    from spark_llm.functions.registry import Registry

    settings = config.option_settings(options)
    registry = Registry.of(spark)
    for key, value in settings.items():
        spark.conf.set(key, value)
    config.from_session(spark)
    _use_own_python(spark)
    registry.install(spark)
    progress.start(spark)
    return spark


def session(
    master: str = "local[*]",
    *,
    app_name: str = "spark-llm",
    conf: Mapping[str, Any] | None = None,
    **options: Any,
) -> SparkSession:
    """A Spark session with llm() enabled: workers run this Python, Arrow is on, a local Spark has as many shuffle
    partitions as cores, and queries share the task slots and the engines fairly.

    ``conf`` holds further Spark settings and wins over these; ``options`` are as in ``enable()``, but hold for all
    sessions of the application. A session that is already running is returned as ``getOrCreate()`` does.
    """
    from pyspark.sql import SparkSession

    settings: dict[str, Any] = {
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.scheduler.mode": "FAIR",
        "spark.ui.showConsoleProgress": "false",  # it would write over llm()'s own progress line
    }
    if not _has_pools():
        settings[_POOLS] = Path(__file__).with_name("fairscheduler.xml").as_uri()
    if master.startswith("local"):
        # Without this, Spark looks the host's name up, which fails on many laptops and in containers.
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        settings["spark.sql.shuffle.partitions"] = _local_cores(master)
    settings |= conf or {}
    settings |= config.option_settings(options)
    builder = SparkSession.builder.master(master).appName(app_name)
    for key, value in settings.items():
        builder = builder.config(key, value)
    if master.startswith("local") and "spark.pyspark.python" not in settings:
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    return enable(builder.getOrCreate())


def _use_own_python(spark: SparkSession) -> None:
    """Run workers with the driver's Python where Spark would take any ``python3``: on this machine, unless told."""
    context = spark.sparkContext
    told = "PYSPARK_PYTHON" in os.environ or context.getConf().contains("spark.pyspark.python")
    if context.master.startswith("local") and not told:
        context.pythonExec = sys.executable


def _has_pools() -> bool:
    """Has the user a file with the pools of the fair scheduler: in Spark's configuration folder, or named in it or to
    spark-submit?"""
    from pyspark import SparkConf, SparkContext

    folder = Path(os.environ.get("SPARK_CONF_DIR") or Path(os.environ.get("SPARK_HOME", ""), "conf"))
    if (folder / "fairscheduler.xml").exists():
        return True
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # the JVM of spark-submit runs already, and knows its settings
        SparkContext._ensure_initialized()
        return bool(SparkConf().contains(_POOLS))
    defaults = folder / "spark-defaults.conf"
    return defaults.exists() and _POOLS in defaults.read_text("utf-8")


def _local_cores(master: str) -> int:
    if cluster := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,\s*\d+\s*\]", master):
        return int(cluster[1]) * int(cluster[2])
    cores = re.fullmatch(r"local\[(\d+|\*).*\]", master)
    if cores is None:
        return 1
    return (os.cpu_count() or 1) if cores[1] == "*" else int(cores[1])
