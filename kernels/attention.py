"""Attention of a batch of query blocks over key blocks, with the log-sum-exp that merging needs.

Plain torch; on CPU it takes torch's own flash kernel, which beats a product-softmax-product by far.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v and its log-sum-exp (natural log).

    q: [R, H, M, D]; k, v: [R, H, L, D]; mask: [R, 1, M, L] of q's dtype, added to the scores, or None.
    causal: query i sees keys 0..i (M == L). Returns out [R, H, M, D] of q's dtype and lse [R, H, M] float32.
    Every query must see at least one key.
    """
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    return attend_reference(q, k, v, mask, causal=causal, scale=scale)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by the definition, in float32."""
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.float()
    if causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(unseen, float("-inf"))
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
