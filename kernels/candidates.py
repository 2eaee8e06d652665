"""The LM head for a few candidate tokens a row: a labelled answer needs no logits of the other vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CANDIDATES = 8  # of a program
_COLUMNS = 256  # of hidden at a time


def candidate_logits(hidden: Tensor, head: Tensor, candidates: Tensor) -> Tensor:
    """float32 [S, C]: hidden[s] . head[candidates[s, c]]; -inf where a candidate is negative (padding).

    hidden: [S, H], head: [V, H], one dtype; candidates: int32 [S, C]. All contiguous. Products add in float32 and are
    not rounded to the model's dtype.
    """
    rows, width = hidden.shape
    count = candidates.shape[1]
    out = torch.empty(rows, count, dtype=torch.float32, device=hidden.device)
    if rows and count:
        _candidate_logits[(rows, triton.cdiv(count, _CANDIDATES))](
            hidden, head, candidates, out, width, count, CANDIDATES=_CANDIDATES, COLUMNS=_COLUMNS, num_warps=4
        )
    return out


def candidate_logits_reference(hidden: Tensor, head: Tensor, candidates: Tensor) -> Tensor:
    """The same by the definition."""
    chosen = head[candidates.clamp(min=0).long()].float()
    logits = torch.einsum("sh,sch->sc", hidden.float(), chosen)
    return logits.masked_fill(candidates < 0, -torch.inf)


@triton.jit
def _candidate_logits(hidden, head, candidates, out, width, count, CANDIDATES: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * CANDIDATES + tl.arange(0, CANDIDATES)
    token = tl.load(candidates + row * count + which, mask=which < count, other=-1)
    wanted = token >= 0
    rows = head + token.to(tl.int64)[:, None] * width
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((CANDIDATES, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        at = start + columns
        inside = at < width
        x = tl.load(hidden + row * width + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(rows + at[None, :], mask=wanted[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += weight * x[None, :]
    logits = tl.where(wanted, tl.sum(total, 1), -float("inf"))
    tl.store(out + row * count + which, logits, mask=which < count)
