"""From logits to tokens on the device: greedy, or the rows' own temperature, top-k, top-p and seed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spark_llm.engine.cuda.ranks import ALONE, Ranks
from spark_llm.engine.scheduling.row import Row
from spark_llm.kernels.sampling import sample

_ALL_TOKENS = 2**31 - 1  # as top_k: more than any vocabulary


@dataclass(slots=True)
class Sampling:
    """Of each sampling row: temperature, top_p float32; top_k, position int32; seed int64. position: in the answer."""

    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    seed: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]


def sampling_of(rows: Sequence[Row], positions: npt.NDArray[np.int64]) -> Sampling:
    """positions: of each row's last token, in prompt and answer."""
    for row in rows:
        if row.request.params.temperature > 0 and row.request.seed is None:
            row.request.seed = secrets.randbits(63)  # kept: a recomputed row repeats its draws
    params = [row.request.params for row in rows]
    return Sampling(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_p=np.array([p.top_p for p in params], np.float32),
        top_k=np.array([min(p.top_k, _ALL_TOKENS) for p in params], np.int32),
        seed=np.array([(row.request.seed or 0) & (2**64 - 1) for row in rows], np.uint64).view(np.int64),
        position=(positions + 1 - np.array([row.num_prompt for row in rows])).astype(np.int32),
    )


class Sampler:
    """Draws on ``device``. Greedy steps, the usual ones, upload nothing.

    Each of several ranks draws all tokens from the same logits and seeds, so that no token is sent to another.
    """

    def __init__(self, device: torch.device, vocabulary: int, ranks: Ranks = ALONE) -> None:
        self._device = device
        self._vocabulary = vocabulary
        self._ranks = ranks

    def sample(self, logits: Tensor, sampling: Sampling | None) -> Tensor:
        """int32 [S] from logits [S, vocabulary], of several ranks from each one's part."""
        if sampling is None:
            return self._ranks.greatest(logits, self.draw(logits, None), self._vocabulary)
        return self.draw(self._ranks.whole(logits, self._vocabulary), sampling)

    def draw(self, logits: Tensor, sampling: Sampling | None) -> Tensor:
        """The same from whole logits."""
        out = torch.empty(len(logits), dtype=torch.int32, device=self._device)
        if sampling is None:
            sample(logits, None, None, None, None, None, out)
            return out
        put = self._put
        sample(
            logits, put(sampling.temperature), put(sampling.top_k), put(sampling.top_p), put(sampling.seed),
            put(sampling.position), out,
        )  # fmt: skip
        return out

    def _put(self, values: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
