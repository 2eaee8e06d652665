"""Logits of constrained rows: all but the tokens that keep to the constraint are put out of the question.

Before temperature, top-k and top-p, which thus choose among what is left. Plain torch, on any device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spark_llm.engine.constraints.matcher import Ints

_NOTHING = -torch.inf


def apply_masks(logits: Tensor, places: Ints, masks: Ints) -> None:
    """logits[places[i]] = -inf where masks[i] has no bit. logits: [S, vocabulary] on the CPU; masks: [n, words]."""
    banned = np.unpackbits(np.invert(masks).view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    closed = torch.from_numpy(banned).view(torch.bool)
    if len(places) == len(logits):
        logits.masked_fill_(closed, _NOTHING)
    else:
        for place, row in zip(places.tolist(), closed, strict=True):
            logits[place].masked_fill_(row, _NOTHING)


def keep_candidates(logits: Tensor, places: Tensor, candidates: Tensor) -> Tensor:
    """logits[places[i]] = -inf for all but candidates[i]. Returns these, float32 [m, most], -inf where there is none.

    places: int64 [m]; candidates: int64 [m, most], ascending, then -1.
    """
    there = candidates >= 0
    columns = torch.where(there, candidates, candidates[:, :1])  # written twice, the same: what order is no matter
    rows = places.unsqueeze(1)
    own = logits[rows, columns]
    logits.index_fill_(0, places, _NOTHING)
    logits[rows, columns] = own
    return own.float().masked_fill(~there, _NOTHING)


def first_of_best(own: Tensor, candidates: Tensor) -> Tensor:
    """int64 [m]: of each row the candidate with the greatest logit, of equal ones the first."""
    best: Tensor = candidates.gather(1, own.argmax(-1, keepdim=True)).squeeze(1)
    return best


def log_probs(own: Tensor, candidates: Tensor, tokens: Tensor) -> Tensor:
    """float32 [m]: log of the share that tokens[i] (int64) has of candidates[i], by their logits ``own``."""
    chosen = own.masked_fill(candidates != tokens.unsqueeze(1), _NOTHING).amax(-1)
    probabilities: Tensor = chosen - own.logsumexp(-1)
    return probabilities
