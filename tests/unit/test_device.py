"""Which device an engine takes, and what it says when it cannot have the one it was told to."""

from __future__ import annotations

from types import SimpleNamespace

import pyspark
import pytest
import torch

from spark_llm.config import LlmConf, from_task
from spark_llm.engine.cuda.device import choose_device, device_dtype
from spark_llm.errors import LlmError

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_the_cpu_is_taken_when_it_is_asked_for() -> None:
    assert choose_device("cpu", "none").type == "cpu"


@needs_no_gpu
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto", "none").type == "cpu"


@needs_no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error_that_names_it(device: str) -> None:
    with pytest.raises(LlmError) as error:
        choose_device(device, "none")
    assert error.value.condition == "LLM_DEVICE_NOT_AVAILABLE"
    assert device in str(error.value)


@pytest.mark.parametrize("device", ["cpu", pytest.param("auto", marks=needs_no_gpu)])
def test_fp8_is_refused_where_it_is_not_multiplied(device: str) -> None:
    with pytest.raises(LlmError) as error:
        choose_device(device, "fp8")
    assert error.value.condition == "LLM_DEVICE_NOT_AVAILABLE"
    assert "fp8" in str(error.value)


def test_a_gpu_computes_in_bfloat16_unless_told_otherwise() -> None:
    gpu = torch.device("cuda")
    assert device_dtype("auto", gpu) is torch.bfloat16
    assert device_dtype("float32", gpu) is torch.float32


@pytest.mark.parametrize(
    ("text", "device"),
    [("auto", "auto"), ("CPU", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("CUDA:12", "cuda:12")],
)
def test_devices_as_users_write_them(text: str, device: str) -> None:
    conf = LlmConf.parse({"spark.llm.engine.device": text})
    assert conf.engine_spec().device == device


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:a", "cuda 1", ""])
def test_other_texts_are_no_devices(text: str) -> None:
    with pytest.raises(LlmError, match="LLM_INVALID_CONFIG"):
        LlmConf.parse({"spark.llm.engine.device": text})


class FakeTaskContext:
    """A task with one setting and, perhaps, GPUs that Spark gave it."""

    def __init__(self, device: str, addresses: list[str]) -> None:
        self._device = device
        self._addresses = addresses

    def getLocalProperty(self, key: str) -> str | None:
        return {"spark.llm.engine.device": self._device, "spark.master": "local[2]"}.get(key)

    def resources(self) -> dict[str, SimpleNamespace]:
        return {"gpu": SimpleNamespace(addresses=self._addresses)} if self._addresses else {}


def task(monkeypatch: pytest.MonkeyPatch, device: str, addresses: list[str]) -> None:
    context = FakeTaskContext(device, addresses)
    monkeypatch.setattr(pyspark.TaskContext, "get", classmethod(lambda _: context))


@pytest.mark.parametrize(
    ("setting", "addresses", "device"),
    [
        ("auto", ["3"], "cuda:3"),
        ("cuda", ["1", "2"], "cuda:1"),
        ("cuda:0", ["3"], "cuda:0"),
        ("cpu", ["3"], "cpu"),
        ("auto", [], "auto"),
    ],
)
def test_the_gpu_that_spark_gave_the_task(
    monkeypatch: pytest.MonkeyPatch, setting: str, addresses: list[str], device: str
) -> None:
    task(monkeypatch, setting, addresses)
    assert from_task().device == device


def test_a_gpu_without_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task(monkeypatch, "auto", ["GPU-1b2c"])
    with pytest.raises(LlmError, match="GPU-1b2c"):
        from_task()
