"""Vectors out of a decoder of the Llama family: its last hidden states, pooled as an encoder's. On the CPU."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from spark_llm.engine.encoder.config import Head
from spark_llm.engine.encoder.pooling import pooled
from spark_llm.engine.model.attention import StepAttention
from spark_llm.engine.model.blocks import plan_whole_rows
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool, StepBatch, as_index


class DecoderEmbedder:
    """A decoder ready to embed in ``dtype``; see engine.encoder.engine.Embedder. Its LM head is not used.

    context_length: most tokens of a text that anybody will ask for; 0: as many as the model takes.
    """

    def __init__(
        self,
        config: ModelConfig,
        head: Head,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        context_length: int,
    ) -> None:
        limits = (config.context_length, config.sliding_window, head.window, context_length)
        self.name, self.vocab_size, self.width = config.name, config.vocab_size, config.hidden_size
        self.head, self.device = head, torch.device("cpu")
        self.window = min(limit for limit in limits if limit)
        self._decoder = Decoder(config, weights, dtype, self.window)

    def embed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """float32 [rows, width] of tokens [rows, most tokens] and lengths [rows]; padding is left out."""
        config, dtype = self._decoder.config, self._decoder.dtype
        counts = lengths.numpy()
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        there = torch.arange(tokens.shape[1]) < lengths[:, None]
        total = int(offsets[-1])
        batch = StepBatch(
            tokens=tokens[there],
            positions=as_index(np.concatenate([np.arange(count) for count in counts])),
            slots=torch.arange(total),
            last=torch.empty(0, dtype=torch.int64),
            attention=StepAttention(
                plan_whole_rows(offsets), config.num_heads, config.num_kv_heads, config.head_dim, dtype
            ),
        )
        states = self._decoder.states(batch, KVPool(config, total, dtype))
        padded = states.new_zeros(*tokens.shape, config.hidden_size)
        padded[there] = states
        return pooled(padded, lengths, self.head)
