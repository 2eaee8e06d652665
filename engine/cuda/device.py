"""Which device an engine computes on."""

from __future__ import annotations

import importlib.util
import logging

import torch

from spark_llm.errors import LlmError

log = logging.getLogger(__name__)

_OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16
_FP8 = (8, 9)  # Ada and Hopper
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_devices(requested: str, quantization: str, count: int) -> list[torch.device]:
    """The devices of ``count`` ranks: ``cuda:N`` and the GPUs after it, or those of ``cuda:N,M,...``.

    See choose_device; with more than one, there is no CPU to turn to.
    """
    if count == 1:
        return [choose_device(requested, quantization)]
    listed = _numbers(requested)
    numbers = listed[:count] if len(listed) > 1 else [listed[0] + i for i in range(count)]
    devices = [torch.device("cuda", number) for number in numbers]
    reasons = [] if requested == "cpu" else [_why_not(device) for device in devices]
    if len(reasons) < count or len(set(numbers)) < count or any(reasons):
        found = next(filter(None, reasons), f"{requested} names fewer")
        reason = f"spark.llm.engine.tensorParallel takes {count} GPUs, and {found}"
        raise LlmError("LLM_DEVICE_NOT_AVAILABLE", device=requested, reason=reason)
    return [choose_device(str(device), quantization) for device in devices]


def device_of_instance(requested: str, instance: int, count: int) -> str:
    """What the ``instance``-th engine of an executor asks for where the user named no GPU: the next ``count`` ones."""
    if not instance or requested not in ("auto", "cuda") or choose_device(requested, "none").type == "cpu":
        return requested
    return f"cuda:{instance * count}"


def _numbers(requested: str) -> list[int]:
    """The GPUs that ``requested`` names; the first one where it names none."""
    _, _, numbers = requested.partition(":")
    return [int(number) for number in numbers.split(",")] if numbers else [0]


def choose_device(requested: str, quantization: str) -> torch.device:
    """``auto``: the first GPU that can, else the CPU. LLM_DEVICE_NOT_AVAILABLE for another that is not there."""
    if requested == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", _numbers(requested)[0])
        reason = _why_not(device)
        if reason is not None and requested != "auto":
            raise LlmError("LLM_DEVICE_NOT_AVAILABLE", device=requested, reason=reason)
        if reason is not None:
            log.info("no GPU is used: %s", reason)
            device = torch.device("cpu")
    if quantization == "fp8" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < _FP8):
        kind = "a CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        reason = f"spark.llm.engine.quantization is fp8, which {kind} does not multiply"
        raise LlmError("LLM_DEVICE_NOT_AVAILABLE", device=requested, reason=reason)
    return device


def _why_not(device: torch.device) -> str | None:
    """Why a GPU cannot be used, or None if it can."""
    if not torch.cuda.is_available():
        return "CUDA finds no GPU (or this torch is built without CUDA)"
    if (device.index or 0) >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, numbered from 0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        found, wanted = (".".join(map(str, c)) for c in (capability, _OLDEST))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}, below {wanted}"
    return None


def device_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The number format on a GPU: ``auto`` is bfloat16."""
    return _DTYPES[requested]
