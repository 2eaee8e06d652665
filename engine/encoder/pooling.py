"""From the hidden states of a batch's tokens to one vector a text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spark_llm.engine.encoder.config import Head


def pooled(states: Tensor, lengths: Tensor, head: Head) -> Tensor:
    """float32 [rows, width] of states [rows, most tokens, width]; lengths: int64 [rows], at least 1 each.

    As sentence-transformers' Pooling and Normalize: the mean of a text's tokens, special ones included.
    """
    wide = states.float()
    if head.pooling == "cls":
        found = wide[:, 0]
    elif head.pooling == "lasttoken":
        found = wide[torch.arange(len(wide), device=wide.device), lengths - 1]
    else:
        padding = torch.arange(wide.shape[1], device=wide.device) >= lengths[:, None]
        if head.pooling == "max":
            found = wide.masked_fill(padding[..., None], -torch.inf).amax(1)
        else:
            found = wide.masked_fill(padding[..., None], 0.0).sum(1) / lengths[:, None]
    return F.normalize(found, dim=-1) if head.normalize else found
