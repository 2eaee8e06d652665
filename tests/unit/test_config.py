"""The spark.llm.* table: kinds, precedence of names, errors with a way out, and the engine that it describes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spark_llm import config, config_docs
from spark_llm.config import LlmConf
from spark_llm.errors import LlmError


def conf(**settings: str) -> LlmConf:
    return LlmConf.parse({f"spark.llm.{key.replace('__', '.')}": text for key, text in settings.items()})


def test_defaults_are_those_of_the_table() -> None:
    assert LlmConf.parse({}) == dataclasses.replace(LlmConf(), task_cores=0)
    for entry in config.entries().values():
        assert getattr(LlmConf(), entry.attribute) == entry.parse(entry.default)


def test_names_are_camel_case_and_avoid_what_spark_redacts() -> None:
    redacted = [key for key in config.entries() if any(w in key.lower() for w in ("secret", "password", "token"))]
    assert redacted == ["spark.llm.engine.maxBatchTokens"]  # named so by the issue; documented


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1024", 1024), ("10b", 10), ("4k", 4096), ("4kb", 4096), ("512m", 512 << 20), ("2G", 2 << 30)],
)
def test_sizes(text: str, expected: int) -> None:
    assert conf(engine__kvCacheMemory=text).kv_cache_memory == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("90", 90), ("500ms", 0.5), ("300s", 300), ("5m", 300), ("5min", 300), ("2h", 7200), ("1d", 86400)],
)
def test_times(text: str, expected: float) -> None:
    assert conf(engine__idleTimeout=text).idle_timeout == expected


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("engine.kvCacheMemory", "0.5g", "512m or 2g"),
        ("engine.kvCacheMemory", "-1", "512m or 2g"),
        ("engine.idleTimeout", "soon", "300s or 5m"),
        ("engine.dtype", "int4", "auto, float32, bfloat16 or float16"),
        ("optimizer.mayChangePrompts", "yes", "true or false"),
        ("windowRows", "0", "at least 1"),
        ("windowRows", "12.5", "a whole number"),
        ("maxOutputLength", "", "a whole number"),
        ("onError", "skip", "null or fail"),
        ("model", "", "not empty"),
    ],
)
def test_invalid_values_name_key_value_and_what_is_expected(key: str, text: str, expected: str) -> None:
    with pytest.raises(LlmError) as error:
        LlmConf.parse({f"spark.llm.{key}": text})
    assert error.value.condition == "LLM_INVALID_CONFIG"
    assert error.value.sql_state == "22023"
    for part in (f"spark.llm.{key}", repr(text), expected):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("spark.llm.engine.dtyp", "spark.llm.engine.dtype"),
        ("spark.llm.modle", "spark.llm.model"),
        ("spark.llm.engine.kvcachememory", "spark.llm.engine.kvCacheMemory"),
        ("spark.llm.zzz", "spark.llm."),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(LlmError, match="LLM_UNKNOWN_CONFIG") as error:
        LlmConf.parse({key: "x"})
    assert key in str(error.value)
    assert error.value.parameters["suggestion"].startswith(nearest)


def test_other_keys_of_the_session_are_not_ours() -> None:
    assert LlmConf.parse({"spark.sql.shuffle.partitions": "x", "spark.llmx": "y"}) == LlmConf()


def test_options_take_all_three_spellings() -> None:
    for name in ("spark.llm.engine.kvCacheMemory", "engine.kvCacheMemory", "engine_kv_cache_memory"):
        assert config.option_settings({name: "1g"}) == {"spark.llm.engine.kvCacheMemory": "1g"}
    values = {
        "optimizer_may_change_prompts": False,
        "max_output_length": 8,
        "model": Path("a") / "b",
        "engine_dtype": None,
    }
    assert config.option_settings(values) == {
        "spark.llm.optimizer.mayChangePrompts": "false",
        "spark.llm.maxOutputLength": "8",
        "spark.llm.model": str(Path("a") / "b"),
    }


def test_options_are_checked_at_once() -> None:
    with pytest.raises(LlmError, match=r"LLM_UNKNOWN_CONFIG.*engine_dtyp\b.*engine_dtype"):
        config.option_settings({"engine_dtyp": "float32"})
    with pytest.raises(LlmError, match=r"LLM_INVALID_CONFIG.*'int4'"):
        config.option_settings({"engine_dtype": "int4"})


def test_engine_spec_carries_the_engine_keys() -> None:
    spec = LlmConf.parse(
        {
            "spark.llm.model": "m",
            "spark.llm.engine.dtype": "float32",
            "spark.llm.engine.kvCacheMemory": "1g",
            "spark.llm.engine.maxBatchTokens": "512",
            "spark.llm.engine.threads": "3",
            "spark.llm.engine.idleTimeout": "0",
        }
    ).engine_spec()
    assert (spec.model, spec.dtype, spec.kv_cache_memory) == ("m", "float32", 1 << 30)
    assert (spec.max_batch_tokens, spec.threads, spec.idle_timeout) == (512, 3, 0)
    assert LlmConf().engine_spec("other").model == "other"


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({"spark.master": "local"}, 1),
        ({"spark.master": "local[2]"}, 2),
        ({"spark.master": "local[2,4]"}, 2),
        ({"spark.master": "local[64]"}, 8),
        ({"spark.master": "local[*]"}, 8),
        ({"spark.master": "local-cluster[2,1,1024]"}, 1),
        ({"spark.master": "local-cluster[2, 3, 1024]"}, 3),
        ({"spark.master": "spark://host:7077"}, 8),
        ({"spark.master": "spark://host:7077", "spark.executor.cores": "4"}, 4),
        ({"spark.master": "yarn"}, 1),
        ({"spark.master": "k8s://https://host", "spark.executor.cores": "6"}, 6),
        ({}, 8),
    ],
)
def test_auto_threads_are_the_executors_cores(
    settings: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert LlmConf.parse(settings).engine_spec().threads == threads


def test_the_committed_reference_is_generated() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text("utf-8") == config_docs.render(), (
        "run: python -P -m spark_llm.config_docs docs/configuration.md"
    )


def test_import_is_light() -> None:
    """``import spark_llm`` under 0.3 s; neither it nor the configuration pulls in torch or pyspark."""
    code = (
        "import time, sys; t = time.perf_counter(); import spark_llm; seconds = time.perf_counter() - t\n"
        "import spark_llm.config, spark_llm.functions\n"
        "print(seconds, [m for m in ('torch', 'pyspark') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "12"]
    seconds, modules = zip(*(run.stdout.strip().split(" ", 1) for run in runs), strict=True)
    assert set(modules) == {"[]"}
    assert min(map(float, seconds)) < 0.3
