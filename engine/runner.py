"""Runs a step on the CPU: lays its rows out flat, one forward pass, one token for each row that lacks no more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from spark_llm.engine.constraints.step import StepChoices, mask_words, masking
from spark_llm.engine.model.attention import StepAttention
from spark_llm.engine.model.blocks import plan_attention, slots
from spark_llm.engine.model.choosing import apply_masks, first_of_best, keep_candidates, log_probs
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool, StepBatch, as_index
from spark_llm.engine.model.sampling import sample
from spark_llm.engine.scheduling.lanes import Floats, Ints
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row


class Done:
    """A step that has run. See Pending."""

    def __init__(self, tokens: Ints, log_probs: Floats | None = None) -> None:
        self._tokens = tokens
        self._log_probs = log_probs

    def tokens(self) -> Ints:
        return self._tokens

    def log_probs(self) -> Floats:
        assert self._log_probs is not None
        return self._log_probs


class Runner:
    """A decoder and its K/V pool. cascade False: shared prefixes are read once per row (the plain path), and logits of
    candidates are computed with all others, so that neither batch nor cache changes a bit."""

    depth = 1

    def __init__(self, decoder: Decoder, pool: KVPool, page_size: int, *, cascade: bool = True) -> None:
        self.decoder = decoder
        self.pool = pool
        self.page_size = page_size
        self.cascade = cascade
        self._narrows = cascade and decoder.reads_candidates

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    def launch(self, plan: StepPlan) -> Done:
        """Run the step to its end."""
        sampling = [*plan.lanes.rows_of(plan.sampling), *plan.lanes.rows_of(plan.decode)]
        if plan.choices is not None:
            return self._choose(plan, plan.choices, sampling)
        logits = self.decoder.forward(self._batch(plan), self.pool)
        return Done(np.array(sample(logits, sampling), np.int32))

    @torch.inference_mode()
    def _choose(self, plan: StepPlan, choices: StepChoices, sampling: list[Row]) -> Done:
        """The same for a step with constrained rows; their masks are made while the model runs."""
        listed, candidates = torch.from_numpy(choices.listed).long(), torch.from_numpy(choices.candidates).long()
        masks = np.empty((len(choices.masked), mask_words(self.config.vocab_size)), np.int32)
        with masking(choices, masks) as making:
            batch = self._batch(plan)
            draws = any(row.request.params.temperature > 0 for row in sampling)
            if choices.only_lists(len(sampling)) and self._narrows and not draws:
                own = self.decoder.forward(batch, self.pool, candidates).masked_fill(candidates < 0, -torch.inf)
                tokens = first_of_best(own, candidates)
            else:
                logits = self.decoder.forward(batch, self.pool)
                making.wait()
                apply_masks(logits, choices.masked, masks)
                own = keep_candidates(logits, listed, candidates)
                tokens = torch.tensor(sample(logits, sampling))
        found = np.full(len(sampling), np.nan, np.float32)
        found[choices.listed] = log_probs(own, candidates, tokens[listed]).numpy()
        return Done(tokens.numpy().astype(np.int32), found)

    def input_tokens(self, plan: StepPlan) -> Ints:
        """The tokens that decoding rows compute: those sampled last. int32 [len(plan.decode)]."""
        return plan.lanes.input_tokens(plan.decode, plan.positions)

    def _batch(self, plan: StepPlan) -> StepBatch:
        rows, config = plan.shares(), self.decoder.config
        offsets = np.concatenate([[0], np.cumsum([s.count for s in rows])]).astype(np.int64)
        attention = plan_attention(rows, offsets, self.page_size, cascade=self.cascade)
        tokens = [s.row.tokens[s.start : s.start + s.count] for s in plan.rows]
        return StepBatch(
            tokens=as_index(np.concatenate([*tokens, self.input_tokens(plan)])),
            positions=as_index(np.concatenate([np.arange(s.start, s.start + s.count) for s in rows])),
            slots=as_index(np.concatenate([slots(s.row, s.start, s.start + s.count, self.page_size) for s in rows])),
            last=as_index(np.array([end - 1 for s, end in zip(rows, offsets[1:], strict=True) if s.samples])),
            attention=StepAttention(
                attention, config.num_heads, config.num_kv_heads, config.head_dim, self.decoder.dtype
            ),
        )


def poison(pool: KVPool, free: npt.NDArray[np.int32], page_size: int) -> None:
    """Fill free pages with NaN (tests): whoever reads a page that is not his gets NaN answers."""
    at = (free[:, None].astype(np.int64) * page_size + np.arange(page_size)).reshape(-1)
    index = torch.from_numpy(at)
    pool.k[:, index] = float("nan")
    pool.v[:, index] = float("nan")
