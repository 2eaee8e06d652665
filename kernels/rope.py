"""Rotary embedding of q and k, Qwen3's head norms before it, and the K/V write into the page pool, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS_A_PROGRAM = 16


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
    block = min(_HEADS_A_PROGRAM, triton.next_power_of_2(max(heads, kv_heads)))
    grid = (tokens, triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block))
    _rope[grid](
        qkv, cos_sin, positions, lanes, table, k_pool, v_pool, q_out,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, table.shape[1], eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=triton.next_power_of_2(dim // 2), PAGE=page_size,
        HAS_NORM=q_norm is not None, BLOCK=block, num_warps=2,
    )  # fmt: skip


def rope_reference(heads: Tensor, cos_sin: Tensor, positions: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """Rotated heads [T, n, D] (normed before, with ``norm``), by the definition: x e^(i angle) of each pair."""
    dtype, half = heads.dtype, heads.shape[-1] // 2
    if norm is not None:
        wide = heads.float()
        wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype).float()
        heads = (wide * norm.float()).to(dtype)
    angles = cos_sin[positions.long()][:, None]
    pairs = torch.complex(heads[..., :half].float(), heads[..., half:].float())
    rotated = pairs * torch.complex(angles[..., :half], angles[..., half:])
    return torch.cat((rotated.real, rotated.imag), -1).to(dtype)


@triton.jit
def _rope(
    qkv, cos_sin, positions, lanes, table, k_pool, v_pool, q_out, q_norm, k_norm, width, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK heads of one token, all of q, all of k or all of v."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK - 1) // BLOCK
    source = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM)
    position = tl.load(positions + token)
    angles = cos_sin + position.to(tl.int64) * DIM
    if block < q_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        _rotate(
            source, q_out + token * (HEADS * DIM), head, head < HEADS, angles, q_norm, eps, DIM, HALF, HAS_NORM
        )  # fmt: skip
    else:
        lane = tl.load(lanes + token).to(tl.int64)
        page = tl.load(table + lane * width + position // PAGE).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * (KV_HEADS * DIM)
        if block < q_blocks + kv_blocks:
            head = (block - q_blocks) * BLOCK + tl.arange(0, BLOCK)
            _rotate(
                source + HEADS * DIM, k_pool + slot, head, head < KV_HEADS, angles, k_norm, eps, DIM, HALF, HAS_NORM
            )  # fmt: skip
        else:
            head = (block - q_blocks - kv_blocks) * BLOCK + tl.arange(0, BLOCK)
            dims = tl.arange(0, 2 * HALF)
            at = head[:, None] * DIM + dims[None, :]
            inside = (head < KV_HEADS)[:, None] & (dims < DIM)[None, :]
            tl.store(v_pool + slot + at, tl.load(source + (HEADS + KV_HEADS) * DIM + at, mask=inside), mask=inside)


@triton.jit
def _rotate(
    source, target, head, is_head, angles, norm, eps, DIM: tl.constexpr, HALF: tl.constexpr, HAS_NORM: tl.constexpr
):  # fmt: skip
    pair = tl.arange(0, HALF)
    half: tl.constexpr = DIM // 2
    in_half = pair < half
    at = head[:, None] * DIM + pair[None, :]
    inside = is_head[:, None] & in_half[None, :]
    first = tl.load(source + at, mask=inside, other=0.0)
    second = tl.load(source + at + half, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
        weight_a = tl.load(norm + pair, mask=in_half, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(norm + half + pair, mask=in_half, other=0.0).to(tl.float32)[None, :]
        # rounded where the CPU decoder rounds
        a = ((a * scale).to(first.dtype).to(tl.float32) * weight_a).to(first.dtype).to(tl.float32)
        b = ((b * scale).to(first.dtype).to(tl.float32) * weight_b).to(first.dtype).to(tl.float32)
    cos = tl.load(angles + pair, mask=in_half, other=0.0)[None, :]
    sin = tl.load(angles + half + pair, mask=in_half, other=0.0)[None, :]
    tl.store(target + at, (a * cos - b * sin).to(first.dtype), mask=inside)
    tl.store(target + at + half, (b * cos + a * sin).to(first.dtype), mask=inside)
