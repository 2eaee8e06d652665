"""SiLU of the gate times the up projection, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up. gate_up: [tokens, 2 I], gate first; out: [tokens, I]."""
    tokens, inner = out.shape
    if tokens:
        _silu_and_mul[(tokens, triton.cdiv(inner, _BLOCK))](gate_up, out, inner, BLOCK=_BLOCK, num_warps=4)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The same by the definition."""
    gate, up = gate_up.chunk(2, -1)
    silu = F.silu(gate.float()).to(gate_up.dtype)
    return (silu.float() * up.float()).to(gate_up.dtype)


@triton.jit
def _silu_and_mul(gate_up, out, inner, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + token * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * inner + at, (silu * up).to(out.dtype.element_ty), mask=inside)
