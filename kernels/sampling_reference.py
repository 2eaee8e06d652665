"""Sampling by the definition, in plain torch: what kernels/sampling.py must draw."""

from __future__ import annotations

import torch
from torch import Tensor

from spark_llm.kernels.sampling import BLOCK


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The same by the definition, in float64: int32 [S]."""
    tokens = []
    parameters = zip(temperature, top_k, top_p, seed, position, strict=True)
    for row, (heat, k, p, row_seed, row_position) in zip(logits.double().cpu(), parameters, strict=True):
        if heat == 0:
            tokens.append(int(row.argmax()))
            continue
        scaled, ids = ((row - row.max()) / heat.double().cpu()).sort(descending=True, stable=True)
        if k:
            scaled, ids = scaled[:k], ids[:k]
        if p < 1:
            kept = int(torch.searchsorted(scaled.softmax(-1).cumsum(-1), p.double().cpu())) + 1
            scaled, ids = scaled[:kept], ids[:kept]
        noise = noise_reference(int(row_seed), int(row_position), ids)
        tokens.append(int(ids[(scaled + noise).argmax()]))
    return torch.tensor(tokens, dtype=torch.int32)


def noise_reference(seed: int, position: int, ids: Tensor) -> Tensor:
    """Gumbel noise of the tokens ``ids`` (int64), float64, as the kernel makes it of Philox4x32-10."""
    low, quarter = 2**32 - 1, BLOCK // 4
    zero = torch.zeros_like(ids)
    words = [ids // BLOCK * quarter + ids % quarter, zero + (position & low), zero, zero]
    keys = [seed & low, seed >> 32 & low]
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = _product(words[0], 0xD2511F53), _product(words[2], 0xCD9E8D57)
        words = [high_b ^ words[1] ^ keys[0], low_b, high_a ^ words[3] ^ keys[1], low_a]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    bits = torch.stack(words).gather(0, (ids % BLOCK // quarter)[None])[0]
    return -torch.log(-torch.log1p(-((bits.double() + 0.5) * 2.0**-32)))


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of numbers below 2**32."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return upper + (lower >> 16) >> 16, ((upper & 0xFFFF) << 16) + lower & (2**32 - 1)
