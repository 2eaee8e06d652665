"""The Spark session of all tests under tests/spark: one small local JVM for the whole run."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark import cloudpickle
from pyspark.sql import SparkSession

import spark_llm
from spark_llm.call import GroupSpec
from spark_llm.functions.registry import Registry
from spark_llm.udf import pandas_function

# The modules beside this one; workers cannot import them, so what they have is pickled by value.
sys.path.append(str(Path(__file__).parent))
import fake_counting
import fake_engine

for module in (fake_engine, fake_counting):
    cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """A plain ``local[2]`` session without llm(); for a clean function registry take ``spark.newSession()``."""
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    scratch: Path = tmp_path_factory.mktemp("spark")
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")  # the speeds of fakes are nobody's to remember
    session = (
        SparkSession.builder.master("local[2]")
        .appName("spark-llm tests")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.driver.memory", "1g")
        .config("spark.driver.extraJavaOptions", "-Xms768m")  # else it collects all garbage again and again to grow
        .config("spark.sql.warehouse.dir", str(scratch / "warehouse"))
        .config("spark.local.dir", str(scratch / "local"))
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.llm.tasksPerEngine", "2")  # all slots: plans as they are without holding any back
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of two small layers with random weights: its engines start in seconds and answer nonsense."""
    folder: Path = tmp_path_factory.mktemp("random")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 49152,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return f"dummy:{folder}"


@functools.cache
def fake_echo_udf(calls: int) -> Any:
    """Stands in for the real UDF, of one call or of a group: answers each row with its own arguments as a JSON array
    (spec, prompt, field ..., [mask]), in a group with those of each call."""

    def fake_echo(batches: Iterator[tuple[pd.Series[str], ...]]) -> Iterator[Any]:
        for columns in batches:
            if not calls:
                yield pd.Series([json.dumps(row) for row in zip(*columns, strict=True)], dtype=object)
            elif len(columns[0]):
                group = GroupSpec.decode(columns[0].iloc[0])
                parts = [[columns[1 + number] for number in numbers] for numbers in group.arguments]
                echoes = [
                    [json.dumps([spec.encode(), *row]) for row in zip(*part, strict=True)]
                    for spec, part in zip(group.calls, parts, strict=True)
                ]
                yield pd.DataFrame({f"a{call}": echo for call, echo in enumerate(echoes)})

    return pandas_function(fake_echo, calls)


@contextlib.contextmanager
def _echoing(spark: SparkSession) -> Iterator[SparkSession]:
    with Registry.of(spark).using(spark, lambda tables, calls=0: fake_echo_udf(calls)):
        yield spark_llm.enable(spark.newSession())


@pytest.fixture
def echo(spark: SparkSession) -> Iterator[SparkSession]:
    """A fresh session with llm() enabled over the echoing fake."""
    with _echoing(spark) as found:
        yield found


@pytest.fixture(scope="module")
def shared_echo(spark: SparkSession) -> Iterator[SparkSession]:
    """As ``echo``, but one session for a module; its tests put their settings back (``settings_of_a_test``)."""
    with _echoing(spark) as found:
        yield found


@pytest.fixture
def model(spark: SparkSession, tmp_path: Path) -> Iterator[fake_counting.FakeModel]:
    """A fresh session over the real UDF and a fake model, which answers with hashes and writes down every call."""
    with fake_counting.fake_model(spark, tmp_path, reads_order=True) as found:
        yield found


@pytest.fixture
def unordered_model(spark: SparkSession, tmp_path: Path) -> Iterator[fake_counting.FakeModel]:
    """As ``model``, but the order of a prompt's lines is nothing to it."""
    with fake_counting.fake_model(spark, tmp_path, reads_order=False) as found:
        yield found


@pytest.fixture
def yes_no_model(spark: SparkSession, tmp_path: Path) -> Iterator[fake_counting.FakeModel]:
    """As ``model``, but it answers yes or no, as the hash of the prompt says."""
    with fake_counting.fake_model(spark, tmp_path, reads_order=True, answers=("yes", "no")) as found:
        yield found
