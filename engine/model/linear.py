"""Matrix products of the decoder on CPU: torch's own or oneDNN with packed weights, whichever is faster here.

On some CPUs torch's default float32 product leaves a third of the speed unused (MKL does not take AVX-512 on
every CPU), on others packing costs; a measurement of a few milliseconds at load decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_PROBE_TOKENS = 256
_PROBE_SHAPE = (1536, 576)  # out, in features: a small model's layer, so that the probe costs milliseconds
_PACK_GAIN = 1.05  # packed weights must be this much faster: they are opaque to everything else


class Linear:
    """y = x W^T + b. weight: [out, in]; x: [tokens, in]."""

    __slots__ = ("bias", "packed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = False) -> None:
        self.packed = pack
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PROBE_TOKENS) if pack else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return F.linear(x, self.weight, self.bias)


def packing_pays(dtype: torch.dtype) -> bool:
    """Whether packed oneDNN weights beat torch's product for ``dtype`` on this CPU, by measurement."""
    weight = torch.randn(_PROBE_SHAPE).to(dtype)
    x = torch.randn(_PROBE_TOKENS, _PROBE_SHAPE[1]).to(dtype)
    try:
        packed = Linear(weight, pack=True)
        packed(x)
    except (RuntimeError, AttributeError):  # a torch without oneDNN, or a CPU it does not serve
        return False
    plain = Linear(weight)
    return _seconds(lambda: plain(x)) > _PACK_GAIN * _seconds(lambda: packed(x))


def fastest_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it faster than float32 (AVX512-BF16, AMX), else float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.randn(_PROBE_SHAPE).to(dtype), torch.randn(_PROBE_TOKENS, _PROBE_SHAPE[1]).to(dtype)
        layer = Linear(weight)
        seconds[dtype] = _seconds(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
    return torch.bfloat16 if seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32


def _seconds(call: Callable[[], object]) -> float:
    """The fastest of five runs after a warm-up: other load can only make a run slower."""
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
