"""SiLU of the gate times the up projection, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from spark_llm.kernels.quantize import store_fp8

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor, out: Tensor, scale: Tensor | None = None) -> None:
    """out = silu(gate) * up. gate_up: [tokens, 2 I], gate first; out: [tokens, I], contiguous, one dtype.

    With ``scale`` (float32 [tokens], written) out is float8_e4m3fn: what quantize_fp8 would make of it.
    """
    tokens, inner = out.shape
    if not tokens:
        return
    if scale is None:
        _silu_and_mul[(tokens, triton.cdiv(inner, _BLOCK))](
            gate_up, out, out, inner, FP8=False, BLOCK=_BLOCK, num_warps=4
        )
        return
    block = triton.next_power_of_2(inner)  # the scale is that of a whole row
    _silu_and_mul[(tokens, 1)](
        gate_up, out, scale, inner, FP8=True, BLOCK=block, num_warps=min(16, max(1, block // 512))
    )  # fmt: skip


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The same by the definition."""
    gate, up = gate_up.chunk(2, -1)
    silu = F.silu(gate.float()).to(gate_up.dtype)
    return (silu.float() * up.float()).to(gate_up.dtype)


@triton.jit
def _silu_and_mul(gate_up, out, scales, inner, FP8: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = gate_up.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + token * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    result = (silu * up).to(dtype)
    if FP8:
        store_fp8(out + token * inner, scales, token, at, inside, result.to(tl.float32))
    else:
        tl.store(out + token * inner + at, result, mask=inside)
