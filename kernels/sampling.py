from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature, top_k, top_p, seed, position, out: Tensor) -> None:
    torch.argmax(logits, -1, out=None)
    out.copy_(logits.argmax(-1))
