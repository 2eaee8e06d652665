"""FP8 (e4m3) with one float32 scale a row: activations as they come, weights once by output channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(448.0)  # of e4m3
_SMALLEST = tl.constexpr(1e-12)  # a row of zeros needs a scale too


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x8 [tokens, K] float8_e4m3fn and scale float32 [tokens], x8 * scale = x but for rounding. x: contiguous."""
    tokens, width = x.shape
    x8 = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        block = triton.next_power_of_2(width)
        _quantize[(tokens,)](x, x8, scale, width, BLOCK=block, num_warps=min(16, max(1, block // 512)))
    return x8, scale


def quantize_channels_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w8 [N, K] and scale float32 [N] of a weight [N, K], by the definition."""
    most = weight.abs().amax(-1, keepdim=True).float().clamp(min=_SMALLEST.value)
    largest = torch.full_like(most, _LARGEST.value)  # with a number, torch multiplies by a rounded reciprocal
    return (weight.float() * (largest / most)).to(torch.float8_e4m3fn), (most / largest).view(-1)


@triton.jit
def store_fp8(target, scale, row, at, inside, value):
    """A row's values (float32, 0 outside) in e4m3 at ``target``, and their scale at ``scale`` + row."""
    most = tl.maximum(tl.max(tl.abs(value), 0), _SMALLEST)
    tl.store(scale + row, tl.div_rn(most, _LARGEST))
    shrunk = value * tl.div_rn(_LARGEST, most)
    tl.store(target + at, shrunk.to(tl.float8e4nv), mask=inside)


@triton.jit
def _quantize(x, x8, scale, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    store_fp8(x8 + row * width, scale, row, at, inside, value)
