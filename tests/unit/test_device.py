"""Which device an engine takes, and what it says when it cannot have the one it was told to."""

from __future__ import annotations

from types import SimpleNamespace

import pyspark
import pytest
import torch

from spark_llm.config import LlmConf, from_task
from spark_llm.engine.cuda import device as device_module
from spark_llm.engine.cuda.device import choose_device, choose_devices, device_dtype, device_of_instance
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
    [
        ("auto", "auto"),
        ("CPU", "cpu"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        ("CUDA:12", "cuda:12"),
        ("cuda:1,3",) * 2,
    ],
)
def test_devices_as_users_write_them(text: str, device: str) -> None:
    conf = LlmConf.parse({"spark.llm.engine.device": text})
    assert conf.engine_spec().device == device


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:a", "cuda 1", "cuda:1,", "cuda:,1", ""])
def test_other_texts_are_no_devices(text: str) -> None:
    with pytest.raises(LlmError, match="LLM_INVALID_CONFIG"):
        LlmConf.parse({"spark.llm.engine.device": text})


class FakeTaskContext:
    """A task with some settings and, perhaps, GPUs that Spark gave it."""

    def __init__(self, device: str, addresses: list[str], ranks: int, **settings: str) -> None:
        self._settings = {
            "spark.llm.engine.device": device,
            "spark.llm.engine.tensorParallel": str(ranks),
            "spark.master": "local[2]",
            **settings,
        }
        self._addresses = addresses

    def getLocalProperty(self, key: str) -> str | None:
        return self._settings.get(key)

    def partitionId(self) -> int:
        return 5

    def resources(self) -> dict[str, SimpleNamespace]:
        return {"gpu": SimpleNamespace(addresses=self._addresses)} if self._addresses else {}


def task(monkeypatch: pytest.MonkeyPatch, device: str, addresses: list[str], ranks: int = 1, **settings: str) -> None:
    context = FakeTaskContext(device, addresses, ranks, **settings)
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


@pytest.mark.parametrize(("addresses", "instance"), [([], 1), (["3"], 0)])
def test_tasks_share_the_engines_of_their_executor(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], instance: int
) -> None:
    task(monkeypatch, "auto", addresses, **{"spark.llm.engine.perExecutor": "4"})
    spec = from_task().engine_spec()
    assert spec.instance == instance, "partition 5 of 4 engines; or Spark says which GPU"
    assert spec.threads == 1, "of two cores, at least one each"


@pytest.mark.parametrize(
    ("requested", "instance", "ranks", "device"),
    [("auto", 0, 1, "auto"), ("cuda", 2, 1, "cuda:2"), ("auto", 1, 2, "cuda:2"), ("cuda:3", 1, 1, "cuda:3")],
)
def test_engines_of_an_executor_take_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, requested: str, instance: int, ranks: int, device: str
) -> None:
    assert device_of_instance("cpu", instance, ranks) == "cpu"
    monkeypatch.setattr(device_module, "_why_not", lambda device: "there is none")
    assert device_of_instance("auto", instance, ranks) == "auto", "all on the CPU"
    monkeypatch.setattr(device_module, "_why_not", lambda device: None)
    assert device_of_instance(requested, instance, ranks) == device


def test_a_gpu_without_a_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task(monkeypatch, "auto", ["GPU-1b2c"])
    with pytest.raises(LlmError, match="GPU-1b2c"):
        from_task()


@pytest.mark.parametrize(("addresses", "device"), [(["4", "7"], "cuda:4,7"), (["4", "7", "9"], "cuda:4,7")])
def test_the_gpus_of_a_task_are_those_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], device: str
) -> None:
    task(monkeypatch, "auto", addresses, ranks=2)
    assert from_task().device == device


def test_a_task_with_fewer_gpus_than_ranks_is_told_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    task(monkeypatch, "auto", ["4"], ranks=2)
    with pytest.raises(LlmError, match=r"spark\.task\.resource\.gpu\.amount=2"):
        from_task()


@pytest.mark.parametrize(
    ("requested", "count", "found"),
    [
        ("auto", 2, [0, 1]),
        ("cuda", 4, [0, 1, 2, 3]),
        ("cuda:2", 2, [2, 3]),
        ("cuda:3,1", 2, [3, 1]),
        ("cuda:3,1,2", 2, [3, 1]),
    ],
)
def test_the_gpus_of_ranks(monkeypatch: pytest.MonkeyPatch, requested: str, count: int, found: list[int]) -> None:
    monkeypatch.setattr(device_module, "_why_not", lambda device: None if device.index < 4 else "there are 4 GPUs")
    assert [device.index for device in choose_devices(requested, "none", count)] == found


@pytest.mark.parametrize(
    ("requested", "count"), [("cpu", 2), ("cuda:3", 2), ("auto", 8), ("cuda:0,1,2", 4), ("cuda:1,1", 2)]
)
def test_ranks_without_a_gpu_of_their_own(monkeypatch: pytest.MonkeyPatch, requested: str, count: int) -> None:
    monkeypatch.setattr(device_module, "_why_not", lambda device: None if device.index < 4 else "there are 4 GPUs")
    with pytest.raises(LlmError, match=f"takes {count} GPUs") as error:
        choose_devices(requested, "none", count)
    assert error.value.condition == "LLM_DEVICE_NOT_AVAILABLE"
