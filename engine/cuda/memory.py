"""How much of the GPU the K/V pool may take: what is left after the weights and the largest step."""

from __future__ import annotations

import time

import torch

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.model.config import ModelConfig
from spark_llm.errors import LlmError

_SETTLE_SECONDS = 15.0  # most that a process takes to give a GPU's memory back
_STILL_SECONDS = 3.0  # without a change, after which nobody is giving any back
_LOOK_SECONDS = 0.25  # between looks
_SHARE = 0.92  # of the device's memory that the engine may use in all; the rest is for libraries and fragmentation


def await_memory(device: torch.device) -> None:
    """Waits while another process gives the GPU's memory back: an engine that was killed takes seconds to end."""
    began = changed = time.monotonic()
    most, total = torch.cuda.mem_get_info(device)
    while most < total / 2 and time.monotonic() < min(changed + _STILL_SECONDS, began + _SETTLE_SECONDS):
        time.sleep(_LOOK_SECONDS)
        free, _ = torch.cuda.mem_get_info(device)
        if free > most:
            most, changed = free, time.monotonic()


def room_on(device: torch.device) -> str:
    """The device, for messages: its name, and what of its memory is other processes'."""
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device))
    return (
        f"{torch.cuda.get_device_name(device)} (other processes hold {others / 2**20:,.0f} of {total / 2**20:,.0f} MiB)"
    )


def pool_pages(spec: EngineSpec, config: ModelConfig, dtype: torch.dtype, device: torch.device, step_bytes: int) -> int:
    """Pages of the K/V pool. step_bytes: what the largest step needs beside the weights, by a run of it.

    LLM_NO_MEMORY if not one page fits or the memory is not there.
    """
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = int(free - (1 - _SHARE) * total - step_bytes)
    page = DevicePool.bytes_per_token(config, dtype) * spec.page_size
    wanted = spec.kv_cache_memory // spec.tensor_parallel or available
    if wanted > available or wanted < page:
        raise LlmError(
            "LLM_NO_MEMORY",
            needed=f"{max(wanted, page) / 2**20:,.2f} MiB",
            purpose=f"its K/V cache on {room_on(device)}",
            available=f"{max(0, min(available, wanted)) / 2**20:,.1f} MiB",
            setting=_culprit(wanted > available, available < page),
        )
    return wanted // page


def _culprit(asks_too_much: bool, nothing_left: bool) -> str:
    """The setting to lower."""
    if nothing_left:
        return "spark.llm.engine.maxBatchTokens"
    return "spark.llm.engine.kvCacheMemory" if asks_too_much else "spark.llm.engine.pageSize"
