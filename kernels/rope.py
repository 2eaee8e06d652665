"""Rotary embedding of q and k, Qwen3's head norms before it, and the K/V write into the page pool, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rope_and_store(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, lanes: Tensor, table: Tensor, k_pool: Tensor, v_pool: Tensor,
    q_out: Tensor, *, page_size: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """q_out = rotated q; the pool's slots of (lane, position) = rotated k, and v.

    qkv: [T, (heads + 2 kv heads) * D]. cos_sin: float32 [context, D]. Pairs are i and i + D / 2.
    """
    tokens, heads, dim = q_out.shape
    kv_heads = k_pool.shape[1]
    if not tokens:
        return
    _rope[(tokens, heads + 2 * kv_heads)](
        qkv, cos_sin, positions, lanes, table, k_pool, v_pool, q_out,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, table.shape[1], eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=triton.next_power_of_2(dim // 2), PAGE=page_size,
        HAS_NORM=q_norm is not None, num_warps=1,
    )  # fmt: skip


@triton.jit
def _rope(
    qkv, cos_sin, positions, lanes, table, k_pool, v_pool, q_out, q_norm, k_norm, width, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    half = DIM // 2
    inside = at < half
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    first = tl.load(source + at, mask=inside, other=0.0)
    second = tl.load(source + half + at, mask=inside, other=0.0)
    position = tl.load(positions + token)
    target = q_out + (token * HEADS + head) * DIM
    if head >= HEADS:
        lane = tl.load(lanes + token).to(tl.int64)
        page = tl.load(table + lane * width + position // PAGE).to(tl.int64)
        slot = page * PAGE + position % PAGE
        if head >= HEADS + KV_HEADS:
            target = v_pool + (slot * KV_HEADS + head - HEADS - KV_HEADS) * DIM
        else:
            target = k_pool + (slot * KV_HEADS + head - HEADS) * DIM
    if head < HEADS + KV_HEADS:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / DIM + eps)
            norm = q_norm
            if head >= HEADS:
                norm = k_norm
            wa = tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
            wb = tl.load(norm + half + at, mask=inside, other=0.0).to(tl.float32)
            a = ((a * scale).to(first.dtype).to(tl.float32) * wa).to(first.dtype).to(tl.float32)
            b = ((b * scale).to(first.dtype).to(tl.float32) * wb).to(first.dtype).to(tl.float32)
        angles = cos_sin + position.to(tl.int64) * DIM
        cos = tl.load(angles + at, mask=inside, other=0.0)
        sin = tl.load(angles + half + at, mask=inside, other=0.0)
        tl.store(target + at, (a * cos - b * sin).to(first.dtype), mask=inside)
        tl.store(target + half + at, (b * cos + a * sin).to(first.dtype), mask=inside)
    else:
        tl.store(target + at, first, mask=inside)
        tl.store(target + half + at, second, mask=inside)
