"""From logits to tokens: greedy, or temperature with top-k and top-p from a seed of the row.

A draw depends on the row's seed and the token's position only (Philox, a counter-based generator), so that batch,
chunking and preemption do not change it. Each token of the vocabulary gets its own noise, and the greatest sum of
logit and noise wins (the Gumbel-max trick): what batches change in the last bits of logits hardly ever changes the
winner, where a place on the cumulated probabilities would be among thousands of borders.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spark_llm.engine.scheduling.row import Row


def sample(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row. logits: [len(rows), vocabulary], float32."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for i, row in enumerate(rows):
        if row.request.params.temperature > 0:
            tokens[i] = _draw(logits[i], row)
    return tokens


def _draw(logits: Tensor, row: Row) -> int:
    params = row.request.params
    if row.request.seed is None:
        row.request.seed = secrets.randbits(63)  # kept: a recomputed row repeats its draws
    scaled = (logits - logits.max()).double() / params.temperature  # at most 0: no temperature overflows it
    ids = torch.arange(len(scaled))
    if params.top_k or params.top_p < 1:
        scaled, ids = scaled.topk(min(params.top_k or len(scaled), len(scaled)))
    if params.top_p < 1:  # the smallest set of tokens whose probability reaches top_p
        keep = int(torch.searchsorted(scaled.softmax(-1).cumsum(-1), params.top_p)) + 1
        scaled, ids = scaled[:keep], ids[:keep]
    key = row.request.seed & (2**64 - 1)  # a seed may be negative, a key may not
    generator = np.random.Generator(np.random.Philox(key=key, counter=row.answered))
    noise = torch.from_numpy(generator.gumbel(size=len(logits)))
    return int(ids[int((scaled + noise[ids]).argmax())])
