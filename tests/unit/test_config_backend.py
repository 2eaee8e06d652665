"""Which server a session asks, and an executor's share of the application's limits."""

from __future__ import annotations

import pytest

from spark_llm.config import LlmConf
from spark_llm.cores import executors
from spark_llm.errors import LlmError

OPENAI = {"spark.llm.backend": "openai", "spark.llm.backend.url": "https://host/v1/"}


def test_the_built_in_engine_is_the_default() -> None:
    assert LlmConf.parse({}).engine_spec().backend is None
    assert LlmConf.parse({"spark.llm.backend.url": "https://host/v1"}).engine_spec().backend is None


def test_a_server_needs_a_url_that_tells_no_secret() -> None:
    backend = LlmConf.parse(OPENAI).engine_spec().backend
    assert backend is not None
    assert backend.url == "https://host/v1"
    with pytest.raises(LlmError, match=r"LLM_INVALID_CONFIG.*spark\.llm\.backend\.url"):
        LlmConf.parse({"spark.llm.backend": "openai"}).engine_spec()
    for url in (
        "host/v1",
        "ftp://host",
        "https://",
        "https://me:word@host/v1",
        "https://host/v1?key=1",
        "https://host/#a",
    ):
        with pytest.raises(LlmError, match="LLM_INVALID_CONFIG"):
            LlmConf.parse({"spark.llm.backend.url": url})


def test_tasks_with_the_same_server_share_a_process_whatever_their_engine_settings() -> None:
    one = LlmConf.parse(OPENAI | {"spark.llm.engine.dtype": "float32", "spark.llm.engine.threads": "3"})
    assert one.engine_spec("m").key == LlmConf.parse(OPENAI).engine_spec("m").key
    assert one.engine_spec("m").key != LlmConf.parse(OPENAI | {"spark.llm.backend.rpm": "9"}).engine_spec("m").key


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"spark.master": "local[4]"}, 1),
        ({"spark.master": "local-cluster[3, 2, 1024]"}, 3),
        ({"spark.master": "yarn", "spark.executor.instances": "5"}, 5),
        ({"spark.master": "spark://h:1", "spark.cores.max": "12", "spark.executor.cores": "4"}, 3),
        ({"spark.master": "yarn", "spark.dynamicAllocation.enabled": "true", "spark.executor.instances": "2"}, 1),
        (
            {
                "spark.master": "yarn",
                "spark.dynamicAllocation.enabled": "true",
                "spark.dynamicAllocation.maxExecutors": "8",
            },
            8,
        ),
        ({"spark.master": "spark://h:1"}, 1),
    ],
)
def test_each_executor_has_its_share(settings: dict[str, str], expected: int) -> None:
    assert executors(settings) == expected
    limits = {"spark.llm.backend.rpm": "120", "spark.llm.backend.tpm": "24000"}
    backend = LlmConf.parse(OPENAI | limits | settings).engine_spec().backend
    assert backend is not None
    assert (backend.rpm, backend.tpm) == (120 / expected, 24000 / expected)
