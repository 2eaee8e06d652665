"""Runs an AttentionPlan against one layer's K/V: own blocks first, then shared prefixes merged in.

Grouped-query attention is folded: the query heads of one kv head lie side by side as queries, so K and V are
never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spark_llm.engine.model.blocks import AttentionPlan, BlockBatch
from spark_llm.kernels.attention import attend, merge


@dataclass(slots=True)
class _Prepared:
    """A BlockBatch as tensors. queries, keys: flat [R * M], [R * L]; target: the tokens that ``valid`` rows are."""

    queries: Tensor
    keys: Tensor
    shape: tuple[int, int, int]
    mask: Tensor | None
    valid: Tensor | None
    target: Tensor


class StepAttention:
    """The attention of one step; built once, run by every layer."""

    def __init__(
        self, plan: AttentionPlan, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self._kv_heads = num_kv_heads
        self._group = num_heads // num_kv_heads
        self._dim = head_dim
        self._scale = head_dim**-0.5
        self._own = [self._prepare(b, dtype) for b in plan.own]
        self._shared = [self._prepare(b, dtype) for b in plan.shared]

    def run(self, q: Tensor, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        """q: [T, heads, D]; pools: [slots, kv heads, D]. Returns [T, heads * D] of q's dtype."""
        tokens, heads, dim = q.shape
        if not self._shared and len(self._own) == 1 and self._own[0].valid is None:
            out, _ = self._attend(self._own[0], q, k_pool, v_pool)
            return out.new_empty(tokens, heads, dim).index_copy_(0, self._own[0].target, out).view(tokens, heads * dim)
        out = torch.empty(tokens, heads, dim, dtype=torch.float32)
        lse = torch.empty(tokens, heads, dtype=torch.float32)
        for block in self._own:
            part, part_lse = self._attend(block, q, k_pool, v_pool)
            out.index_copy_(0, block.target, part.float())
            lse.index_copy_(0, block.target, part_lse)
        for block in self._shared:
            part, part_lse = self._attend(block, q, k_pool, v_pool)
            at = block.target
            both = merge(out.index_select(0, at), lse.index_select(0, at), part.float(), part_lse)
            out.index_copy_(0, at, both[0])
            lse.index_copy_(0, at, both[1])
        return out.to(q.dtype).view(tokens, heads * dim)

    def _attend(self, block: _Prepared, q: Tensor, k_pool: Tensor, v_pool: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of a batch: out [real queries, heads, D] and lse [real queries, heads]."""
        r, m, n = block.shape
        kv, group, dim = self._kv_heads, self._group, self._dim
        k = k_pool.index_select(0, block.keys).view(r, n, kv, dim).transpose(1, 2)
        v = v_pool.index_select(0, block.keys).view(r, n, kv, dim).transpose(1, 2)
        queries = q.index_select(0, block.queries)
        queries = queries.view(r, m, kv, group, dim).permute(0, 2, 3, 1, 4).reshape(r, kv, group * m, dim)
        out, lse = attend(queries, k, v, block.mask, scale=self._scale)
        out = out.reshape(r, kv, group, m, dim).permute(0, 3, 1, 2, 4)
        lse = lse.reshape(r, kv, group, m).permute(0, 3, 1, 2)
        out, lse = out.reshape(r * m, kv * group, dim), lse.reshape(r * m, kv * group)
        if block.valid is None:
            return out, lse
        return out.index_select(0, block.valid), lse.index_select(0, block.valid)

    def _prepare(self, batch: BlockBatch, dtype: torch.dtype) -> _Prepared:
        flat = torch.from_numpy(batch.queries.reshape(-1))
        mask = None
        if batch.hidden is not None:
            hidden = torch.from_numpy(batch.hidden.copy()).unsqueeze(1)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            mask = mask.repeat(1, 1, self._group, 1)
        valid = None if batch.valid is None else torch.from_numpy(batch.valid)
        return _Prepared(
            queries=flat,
            keys=torch.from_numpy(batch.keys.reshape(-1)),
            shape=(*batch.queries.shape, batch.keys.shape[1]),
            mask=mask,
            valid=valid,
            target=flat if valid is None else flat[valid],
        )
