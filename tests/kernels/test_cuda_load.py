"""What loading a model onto a GPU refuses, and how it shares out what there is; no GPU is needed for that."""

from __future__ import annotations

import pytest
import torch

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.cuda import memory
from spark_llm.engine.cuda.graphs import logits_of_graphs
from spark_llm.engine.cuda.load import check_settings, lane_limit
from spark_llm.errors import LlmError


@pytest.mark.parametrize(
    ("spec", "dtype", "key"),
    [
        (EngineSpec(quantization="fp8", deterministic=True), torch.bfloat16, "spark.llm.engine.quantization"),
        (EngineSpec(quantization="fp8", dtype="float16"), torch.float16, "spark.llm.engine.dtype"),
    ],
)
def test_settings_that_exclude_one_another(spec: EngineSpec, dtype: torch.dtype, key: str) -> None:
    with pytest.raises(LlmError) as error:
        check_settings(spec, dtype)
    assert error.value.condition == "LLM_INVALID_CONFIG"
    assert key in str(error.value)


def test_settings_that_do_not() -> None:
    check_settings(EngineSpec(quantization="fp8"), torch.bfloat16)
    check_settings(EngineSpec(deterministic=True, dtype="float32"), torch.float32)


def test_long_contexts_leave_room_for_fewer_rows_in_the_page_table() -> None:
    assert lane_limit(EngineSpec(), 8192) == 4096
    assert lane_limit(EngineSpec(), 131_072) == 2048
    assert lane_limit(EngineSpec(page_size=16), 131_072) == 4096
    assert lane_limit(EngineSpec(max_running_rows=10), 131_072) == 10
    assert lane_limit(EngineSpec(), 1 << 24) == 256


def test_graphs_are_counted_as_many_as_rows_may_need() -> None:
    assert logits_of_graphs(1) == 1
    assert logits_of_graphs(8) == 8 + 4 + 2 + 1
    assert logits_of_graphs(9) == 16 + 8 + 4 + 2 + 1
    assert logits_of_graphs(4096) == logits_of_graphs(512)


class FakeGpu:
    """A GPU of 100 bytes, with its clock: each look shows the next of the free bytes, the last one over and over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
        self.free, self.now, self.slept = list(free), 0.0, 0.0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self._look(), 100))
        monkeypatch.setattr(memory.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(memory.time, "sleep", self._sleep)

    def _look(self) -> int:
        return self.free.pop(0) if len(self.free) > 1 else self.free[0]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


@pytest.mark.parametrize(
    ("free", "waits"),
    [((90,), (0, 0)), ((10, 10, 30, 95), (0.7, 0.8)), ((10,), (3.0, 3.3)), (tuple(range(1, 49)), (11.0, 15.3))],
)
def test_memory_that_is_being_given_back_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, free: tuple[int, ...], waits: tuple[float, float]
) -> None:
    gpu = FakeGpu(monkeypatch, *free)
    memory.await_memory(torch.device("cuda:0"))
    assert waits[0] <= gpu.slept <= waits[1]
