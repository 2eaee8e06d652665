"""A matrix product whose every row is the same bits, whatever other rows there are.

cuBLAS picks another tiling, and with it another order of sums, for another number of rows. Here the order along K is
fixed and never split, so that a row's result depends on that row alone (batch invariance; He et al., "Defeating
Nondeterminism in LLM Inference", 2025). Slower than cuBLAS, most of all for few rows: for the deterministic mode only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_M, _BLOCK_N, _BLOCK_K, _GROUP = 128, 128, 64, 8


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. x: [M, K], weight: [N, K], both contiguous and of one dtype; sums in float32."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    exact = x.dtype == torch.float32
    # float32 tiles take twice the shared memory
    block_k = _BLOCK_K // 2 if exact else _BLOCK_K
    grid = (triton.cdiv(m, _BLOCK_M) * triton.cdiv(n, _BLOCK_N),)
    _matmul[grid](
        x, weight, bias if bias is not None else x, out, m, n, k,
        HAS_BIAS=bias is not None, EXACT=exact, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=block_k, GROUP=_GROUP,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def matmul_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the definition, summed in float32."""
    product = x.float() @ weight.float().t()
    return (product if bias is None else product + bias.float()).to(x.dtype)


@triton.jit
def _matmul(
    x, weight, bias, out, m, n, k,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # Programs go down the rows of a few column blocks at a time, so that those columns stay in the L2 cache.
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    in_group = GROUP * blocks_n
    first = program // in_group * GROUP
    rows = min(blocks_m - first, GROUP)
    block_m = first + program % in_group % rows
    block_n = program % in_group // rows
    at_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at_k = tl.arange(0, BLOCK_K)
    x_at = x + (at_m % m).to(tl.int64)[:, None] * k + at_k[None, :]
    w_at = weight + (at_n % n).to(tl.int64)[None, :] * k + at_k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = at_k < k - start
        a = tl.load(x_at, mask=inside[None, :], other=0.0)
        b = tl.load(w_at, mask=inside[:, None], other=0.0)
        if EXACT:
            total = tl.dot(a, b, total, input_precision="ieee")
        else:
            total = tl.dot(a, b, total)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias + at_n, mask=at_n < n, other=0.0).to(tl.float32)[None, :]
    inside_out = (at_m < m)[:, None] & (at_n < n)[None, :]
    out_at = out + at_m.to(tl.int64)[:, None] * n + at_n[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside_out)
