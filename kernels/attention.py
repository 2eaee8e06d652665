"""Attention of a batch of query blocks over key blocks, with the log-sum-exp that merging needs.

Plain torch; on CPU it takes torch's own flash kernel, which beats a product-softmax-product by far.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch's CPU kernel takes 256 queries at a time from 768 on; their scores then overflow a core's L2 cache and
# it runs at half its speed.
_CPU_QUERIES = 767


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v and its log-sum-exp (natural log).

    q: [R, H, M, D]; k, v: [R, H, L, D]; mask: [R, 1, M, L] of q's dtype, added to the scores, or None.
    Returns out [R, H, M, D] of q's dtype and lse [R, H, M] float32. Every query must see at least one key.
    """
    if q.device.type != "cpu":
        return attend_reference(q, k, v, mask, scale=scale)
    parts = -(-q.shape[2] // _CPU_QUERIES)
    masks = [None] * parts if mask is None else mask.chunk(parts, 2)
    results = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(part, k, v, attn_mask=m, scale=scale)
        for part, m in zip(q.chunk(parts, 2), masks, strict=True)
    ]
    if parts == 1:
        out, lse = results[0]
        return out, lse
    return torch.cat([r[0] for r in results], 2), torch.cat([r[1] for r in results], 2)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by the definition, in float32."""
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.float()
    lse = scores.logsumexp(-1)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), lse


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention over the union of two disjoint key sets from the attention over each.

    out, other_out: [..., D]; lse, other_lse: [...] float32. The weights are exp(lse - max), so nothing
    overflows (cascade attention; FlashInfer, arXiv 2501.01005, section 3).
    """
    top = torch.maximum(lse, other_lse)
    a, b = torch.exp(lse - top), torch.exp(other_lse - top)
    total = a + b
    merged = out * (a / total).unsqueeze(-1) + other_out * (b / total).unsqueeze(-1)
    return merged, top + total.log()
