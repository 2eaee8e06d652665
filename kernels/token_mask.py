"""Tokens that a constraint rules out: their logits become -inf, in place, before anything is sampled."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits of a program


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """logits[rows[i], t] = -inf where bit t % 32 of masks[i, t // 32] is 0.

    logits: [S, vocabulary]; rows: int32 [n]; masks: int32 [n, at least vocabulary / 32]. All contiguous.
    """
    vocabulary = logits.shape[1]
    if len(rows):
        _mask[(len(rows), triton.cdiv(vocabulary, _BLOCK))](
            logits, rows, masks, vocabulary, masks.shape[1], BLOCK=_BLOCK, num_warps=8
        )


def mask_logits_reference(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """The same by the definition."""
    for row, mask in zip(rows.tolist(), masks.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if not mask[token // 32] >> token % 32 & 1:
                logits[row, token] = -float("inf")


@triton.jit
def _mask(logits, rows, masks, vocabulary, words, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocabulary
    word = tl.load(masks + index * words + at // 32, mask=inside, other=0)
    # all are written, not only those that change: whole lines of memory move as fast as they can
    value = tl.load(logits + row * vocabulary + at, mask=inside).to(tl.float32)
    open_ = (word >> (at % 32)) & 1 == 1
    tl.store(logits + row * vocabulary + at, tl.where(open_, value, -float("inf")), mask=inside)
