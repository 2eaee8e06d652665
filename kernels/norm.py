"""Residual addition and RMSNorm (arXiv 1910.07467) in one pass over the residual stream."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark_llm.kernels.quantize import store_fp8


def add_rms_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, out: Tensor, scale: Tensor | None = None
) -> None:
    """residual += x (in its dtype; None adds nothing), then out = norm(residual) * weight.

    x, residual, out: [tokens, hidden], contiguous, one dtype. Inside float32; the normed value is rounded before it
    meets the weight, as the CPU decoder does. With ``scale`` (float32 [tokens], written) out is float8_e4m3fn: what
    quantize_fp8 would make of it.
    """
    tokens, hidden = residual.shape
    if not tokens:
        return
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(tokens,)](
        residual if x is None else x, residual, weight, out, residual if scale is None else scale, hidden, eps,
        HAS_X=x is not None, FP8=scale is not None, BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip


def add_rms_norm_reference(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The new residual and the normed output, by the definition."""
    if x is not None:
        residual = (residual.float() + x.float()).to(residual.dtype)
    wide = residual.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(residual.dtype)
    return residual, (normed.float() * weight.float()).to(residual.dtype)


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, scales, hidden, eps, HAS_X: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * hidden
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    value = tl.load(residual + row + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_X:
        value += tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / hidden + eps)
    normed = (value * scale).to(residual.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    result = (normed * weights).to(residual.dtype.element_ty)
    if FP8:
        store_fp8(out + row, scales, tl.program_id(0), at, inside, result.to(tl.float32))
    else:
        tl.store(out + row + at, result, mask=inside)
