"""Attention of work items over a paged K/V pool: extend, decode and shared prefix in one Triton kernel.

A work item says which queries of the step attend to which run of keys of which lane; a token's results of several items
are merged by log-sum-exp (FlashAttention-2, arXiv 2307.08691; FlashInfer, arXiv 2501.01005, section 3). The query heads
of one kv head lie side by side in a tile, so that K and V are read once for all of them.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634
_INT32_MAX = 2**31 - 1
_MANY_PROGRAMS = 1024  # about eight on each multiprocessor of a large GPU


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    q, k_pool, v_pool, table, order, items, out, part_out, part_lse,
    scale, tokens, width, slot_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
    GATHERS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0).to(tl.int64) * 8
    kv_head = tl.program_id(1)
    count = tl.load(item + 1)
    if count == 0:
        return
    first, lane = tl.load(item), tl.load(item + 2)
    start, stop, causal = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)

    rows = tl.arange(0, TILE)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    is_real = query < count
    if GATHERS:
        token = tl.load(order + first + query, mask=is_real, other=0).to(tl.int64)
    else:
        token = (first + query).to(tl.int64)
    dims = tl.arange(0, DIM_PADDED)
    in_dim = dims < DIM
    q_at = (token * HEADS + head)[:, None] * DIM + dims[None, :]
    queries = tl.load(q + q_at, mask=is_real[:, None] & in_dim[None, :], other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)
    limit = tl.where(is_real, stop, start + 1)
    if causal >= 0:
        limit = tl.minimum(limit, causal + query + 1)

    most = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, DIM_PADDED), tl.float32)
    pages = table + lane.to(tl.int64) * width
    head_at = kv_head * DIM + dims
    # keys that every query sees need no mask
    seen = stop
    if causal >= 0:
        seen = tl.minimum(stop, causal + 1)
    unmasked = start + (seen - start) // KEYS * KEYS
    for at in range(start, unmasked, KEYS):
        keys = at + tl.arange(0, KEYS)
        slots = _slots(pages, keys, PAGE, WIDE)
        kv_at = slots[:, None] * slot_stride + head_at[None, :]
        k = tl.load(k_pool + kv_at, mask=in_dim[None, :], other=0.0) if DIM != DIM_PADDED else tl.load(k_pool + kv_at)
        v = tl.load(v_pool + kv_at, mask=in_dim[None, :], other=0.0) if DIM != DIM_PADDED else tl.load(v_pool + kv_at)
        scores = _dot(queries, k, EXACT, UPCAST)
        most, total, sums = _add(scores, v, most, total, sums, scale, EXACT, UPCAST, False)
    for at in range(unmasked, stop, KEYS):
        keys = at + tl.arange(0, KEYS)
        inside = keys < stop
        slots = _slots(pages, tl.where(inside, keys, start), PAGE, WIDE)
        kv_at = slots[:, None] * slot_stride + head_at[None, :]
        wanted = inside[:, None] & in_dim[None, :]
        k = tl.load(k_pool + kv_at, mask=wanted, other=0.0)
        v = tl.load(v_pool + kv_at, mask=wanted, other=0.0)
        scores = _dot(queries, k, EXACT, UPCAST)
        scores = tl.where(keys[None, :] < limit[:, None], scores, -float("inf"))
        most, total, sums = _add(scores, v, most, total, sums, scale, EXACT, UPCAST, True)

    result = sums / total[:, None]
    wanted = is_real[:, None] & in_dim[None, :]
    if tl.load(item + 7) != 0:
        tl.store(out + q_at, result.to(out.dtype.element_ty), mask=wanted)
    else:
        part = tl.load(item + 6).to(tl.int64) * tokens + token
        part_at = part * HEADS + head
        tl.store(part_out + part_at[:, None] * DIM + dims[None, :], result, mask=wanted)
        tl.store(part_lse + part_at, most * scale + tl.log2(total), mask=is_real)


@triton.jit
def _slots(pages, keys, PAGE: tl.constexpr, WIDE: tl.constexpr):
    if PAGE == 1:
        slots = tl.load(pages + keys)
    else:
        slots = tl.load(pages + keys // PAGE) * PAGE + keys % PAGE
    if WIDE:
        slots = slots.to(tl.int64)
    return slots


@triton.jit
def _dot(queries, k, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        k = k.to(tl.float32)
    if EXACT:
        return tl.dot(queries, tl.trans(k), input_precision="ieee")
    return tl.dot(queries, tl.trans(k))


@triton.jit
def _add(scores, v, most, total, sums, scale, EXACT: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax, base 2, of scores yet to be scaled: the scale goes into the exponent's one multiply-add.

    A block that a query does not see must not change a bit of its result, as which blocks follow hangs on its tile: the
    old sums shrink by exactly 1 where the maximum stays. Multiply-adds are written out, as the compiler may round
    those of a masked block in another way.
    """
    new = tl.maximum(most, tl.max(scores, 1))
    top = new
    if MASKED:  # a row that has seen no key yet has no maximum
        top = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.exp2(tl.fma(scores, scale, -(top * scale)[:, None]))
    shrink = tl.exp2((most - top) * scale)
    total = tl.fma(total, shrink, tl.sum(weights, 1))
    sums = sums * shrink[:, None]
    if UPCAST:
        v = v.to(tl.float32)
    if EXACT:
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")
    else:
        sums = tl.dot(weights.to(v.dtype), v, sums)
    return new, total, sums


@triton.jit(do_not_specialize=["tokens"])
def _merge(
    part_out, part_lse, num_parts, out, tokens, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    parts = tl.load(num_parts + token)
    if parts <= 1:
        return
    dims = tl.arange(0, DIM_PADDED)
    in_dim = dims < DIM
    at = token * HEADS + head
    stride = tokens.to(tl.int64) * HEADS
    most = tl.load(part_lse + at)
    total = 1.0
    sums = tl.load(part_out + at * DIM + dims, mask=in_dim, other=0.0)
    for part in range(1, parts):
        lse = tl.load(part_lse + at + part * stride)
        new = tl.maximum(most, lse)
        mine, theirs = tl.exp2(most - new), tl.exp2(lse - new)
        more = tl.load(part_out + (at + part * stride) * DIM + dims, mask=in_dim, other=0.0)
        sums = sums * mine + more * theirs
        total = total * mine + theirs
        most = new
    tl.store(out + at * DIM + dims, (sums / total).to(out.dtype.element_ty), mask=in_dim)


class Launch(NamedTuple):
    """keys: of a block. registers: most of a thread; None: what the compiler takes."""

    keys: int
    warps: int
    stages: int
    registers: int | None = None


def _launch_options(tile: int, dim: int, exact: bool, programs: int) -> Launch:
    """What ran fastest. exact: float32, whose products take no tensor cores, but registers above all.

    Many small programs hide each other's latencies best as one warp each; few need loads of their own in flight.
    128 registers a thread let two programs of 8 warps share a multiprocessor: one's products run during the other's
    softmax.
    """
    if exact:
        return Launch(32 if tile * dim <= 64 * 64 else 16, 8, 2)
    if dim > 128:  # what fits the shared memory of GPUs older or smaller than a Hopper
        return Launch(32, 4 if tile <= 16 else 8, 2)
    if tile <= 16:
        if dim <= 64:
            return Launch(128, 4, 3)
        return Launch(32, 1, 3) if programs >= _MANY_PROGRAMS else Launch(64, 2, 3)
    if tile <= 64:
        return Launch(32 if dim > 64 else 64, 4, 3, 128)
    return Launch(64, 8, 3, 128) if dim > 64 else Launch(128, 8, 2, 128)


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def attend(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, order: Tensor | None, items: Tensor, out: Tensor,
    part_out: Tensor, part_lse: Tensor, *, page_size: int, scale: float, tile: int,
    options: Launch | None = None,
) -> None:  # fmt: skip
    """Attention of ``items``: softmax(q k^T * scale) v over the keys that each names.

    q, out: [T, heads, D]. k_pool, v_pool: [slots, kv heads, D], one layer. table: int32 [lanes, pages].
    items: int32 [N, 8]: first, count, lane, key_start, key_stop, causal, part, single. Item i is of the tokens
    order[first : first + count], or first and on where ``order`` is None; count is at most tile // (heads / kv heads),
    and 0 does nothing. Its keys are the positions [key_start, key_stop) of the lane; causal -1: all of them for every
    query, else the position of the first query, and query j sees keys up to causal + j. single: the result goes to
    ``out``; else to part ``part`` of part_out float32 [parts, M, heads, D] and part_lse float32 [parts, M, heads] (log
    base 2), for ``merge_parts``. Every query must see a key. tile: 16 to 128, a power of two. options: for measuring
    others than the usual ones.
    """
    if not len(items):
        return
    _, heads, dim = q.shape
    kv_heads = k_pool.shape[1]
    exact = q.dtype == torch.float32
    keys, warps, stages, registers = options or _launch_options(tile, dim, exact, len(items) * kv_heads)
    _attend[(len(items), kv_heads)](
        q, k_pool, v_pool, table, items if order is None else order, items, out, part_out, part_lse,
        scale * _LOG2E, part_lse.shape[1] if part_lse.dim() == 3 else 0, table.shape[1], kv_heads * dim,
        HEADS=heads, GROUP=heads // kv_heads, DIM=dim, DIM_PADDED=triton.next_power_of_2(max(16, dim)), PAGE=page_size,
        TILE=tile, KEYS=keys, EXACT=exact, UPCAST=_INTERPRETED and q.dtype == torch.bfloat16,
        GATHERS=order is not None, WIDE=k_pool.numel() > _INT32_MAX,
        num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip


def attend_reference(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: Tensor, order: Tensor | None, items: Tensor, out: Tensor,
    part_out: Tensor, part_lse: Tensor, *, page_size: int, scale: float,
) -> None:  # fmt: skip
    """``attend`` by the definition, in float32, item after item."""
    group = q.shape[1] // k_pool.shape[1]
    for first, count, lane, start, stop, causal, part, single in items.tolist():
        if not count:
            continue
        tokens = torch.arange(first, first + count, device=q.device)
        tokens = tokens if order is None else order[tokens].long()
        keys = torch.arange(start, stop, device=q.device)
        slots = table[lane, keys // page_size].long() * page_size + keys % page_size
        k, v = (pool[slots].float().repeat_interleave(group, 1) for pool in (k_pool, v_pool))
        scores = torch.einsum("qhd,khd->qhk", q[tokens].float(), k) * scale
        if causal >= 0:
            last = causal + torch.arange(count, device=q.device)
            scores.masked_fill_(keys > last[:, None, None], -torch.inf)
        result = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v)
        if single:
            out[tokens] = result.to(out.dtype)
        else:
            part_out[part, tokens] = result
            part_lse[part, tokens] = scores.logsumexp(-1) * _LOG2E


def merge_parts(part_out: Tensor, part_lse: Tensor, num_parts: Tensor, out: Tensor) -> None:
    """out[t] from the first num_parts[t] parts of token t; a token with one part has its result there already.

    part_out: float32 [parts, M, heads, D]; part_lse: [parts, M, heads]; num_parts: int32 [M]; out: [>= M, heads, D].
    """
    _, tokens, heads, dim = part_out.shape
    _merge[(tokens, heads)](
        part_out,
        part_lse,
        num_parts,
        out,
        tokens,
        HEADS=heads,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        num_warps=1,
    )


def merge_parts_reference(part_out: Tensor, part_lse: Tensor, num_parts: Tensor, out: Tensor) -> None:
    """``merge_parts`` by the definition: results weighted by the share of the softmax's sum that each part holds."""
    for token, parts in enumerate(num_parts.tolist()):
        if parts > 1:
            shares = (part_lse[:parts, token] / _LOG2E).softmax(0)
            out[token] = (part_out[:parts, token] * shares[..., None]).sum(0).to(out.dtype)
