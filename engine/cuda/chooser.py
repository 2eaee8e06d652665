"""Tokens of a step with constrained rows, on the device: masks and candidates before sampling.

Masks are made on the host while the device runs the model, and follow it. Graphs end with the logits, so that they
serve constrained steps as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spark_llm.engine.constraints.step import StepChoices, mask_words
from spark_llm.engine.cuda.inputs import Ints, Staging
from spark_llm.engine.cuda.ranks import Ranks
from spark_llm.engine.cuda.sampler import Sampler, Sampling
from spark_llm.engine.model.choosing import first_of_best, keep_candidates, log_probs
from spark_llm.kernels.token_mask import mask_logits

_MOST_CANDIDATES = 64  # of a row, for which a product of their own pays; see benchmarks/constrained.py
_PIECE = 1 << 20  # int32 of masks that are uploaded at a time


@dataclass(slots=True)
class HostChoices:
    """A step's StepChoices in the order of the device's answers, and so much of it as other ranks need.

    only_lists: all its answers have candidates. masks: int32 [n, words], of ``masked``; filled while the model runs.
    """

    listed: Ints
    candidates: Ints
    masked: Ints
    masks: Ints
    only_lists: bool

    def by_answer(self) -> Ints:
        """The candidates of the device's answers, in their order, where all have some."""
        table = np.empty_like(self.candidates)
        table[self.listed] = self.candidates
        return table


def lay_choices(choices: StepChoices | None, order: npt.NDArray[np.int64], vocab_size: int) -> HostChoices | None:
    """order: where the plan's n-th answer is among the device's."""
    if choices is None:
        return None
    return HostChoices(
        listed=order[choices.listed].astype(np.int32),
        candidates=choices.candidates,
        masked=order[choices.masked].astype(np.int32),
        masks=np.empty((len(choices.masked), mask_words(vocab_size)), np.int32),
        only_lists=choices.only_lists(len(order)),
    )


class Chooser:
    """Draws on ``sampler``'s device among what constraints leave."""

    def __init__(self, sampler: Sampler, staging: Staging, vocabulary: int, ranks: Ranks) -> None:
        self._sampler = sampler
        self._staging = staging
        self._vocabulary = vocabulary
        self._ranks = ranks

    def narrows(self, choices: HostChoices | None, sampling: Sampling | None) -> bool:
        """Whether the logits of candidates are all that a step needs, and few enough for a product of their own."""
        few = choices is not None and choices.only_lists and choices.candidates.shape[1] <= _MOST_CANDIDATES
        return few and sampling is None

    def choose(
        self, logits: Tensor, choices: HostChoices, sampling: Sampling | None, ready: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """int32 [S] from logits [S, vocabulary], which change.

        And float32 [m], the log-probabilities of listed answers' tokens among their candidates.
        ready: waits for the masks; called once the model has been launched.
        """
        logits = self._ranks.whole(logits, self._vocabulary)
        own, candidates, listed = self._keep(logits, choices)
        ready()
        self._mask(logits, choices)
        tokens = self._sampler.draw(logits, sampling)
        return tokens, log_probs(own, candidates, tokens.long()[listed])

    def choose_listed(self, logits: Tensor, choices: HostChoices) -> tuple[Tensor, Tensor]:
        """The same for a step whose answers all have candidates, from their logits alone: [S, most], in their order."""
        views = self._staging.upload({"candidates": choices.by_answer(), "listed": choices.listed})
        candidates = views["candidates"].long()
        own = logits.masked_fill(candidates < 0, -torch.inf)
        tokens = first_of_best(own, candidates)
        return tokens.int(), log_probs(own, candidates, tokens)[views["listed"].long()]

    def _keep(self, logits: Tensor, choices: HostChoices) -> tuple[Tensor, Tensor, Tensor]:
        views = self._staging.upload({"listed": choices.listed, "candidates": choices.candidates})
        listed, candidates = views["listed"].long(), views["candidates"].long()
        return keep_candidates(logits, listed, candidates), candidates, listed

    def _mask(self, logits: Tensor, choices: HostChoices) -> None:
        rows = max(1, _PIECE // choices.masks.shape[1])
        for begin in range(0, len(choices.masked), rows):
            piece = slice(begin, begin + rows)
            views = self._staging.upload({"rows": choices.masked[piece], "masks": choices.masks[piece]})
            mask_logits(logits, views["rows"], views["masks"])
