"""The Llama-family decoder in plain torch: one forward pass over the tokens of a step and the paged K/V pool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from spark_llm.engine.model.attention import StepAttention
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.linear import Linear, packing_pays
from spark_llm.engine.model.rope import interleave, rope_table, rotate


@dataclass(slots=True)
class StepBatch:
    """What a step computes, flat over its rows: T tokens, S of which yield a next token.

    tokens, positions, slots: int64 [T]; slots: where each token's K/V goes in the pool.
    last: int64 [S], the tokens whose logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    last: Tensor
    attention: StepAttention


class Layer:
    """Weights of one decoder layer. q, k and v are one product; gate and up are two, so that each result is
    contiguous and the activation runs in place."""

    __slots__ = ("down", "gate", "input_norm", "k_norm", "o", "post_norm", "q_norm", "qkv", "up")

    def __init__(self, weights: dict[str, Tensor], prefix: str, head_dim: int, *, pack: bool) -> None:
        def take(name: str) -> tuple[Tensor, Tensor | None]:
            return weights.pop(f"{prefix}{name}.weight"), weights.pop(f"{prefix}{name}.bias", None)

        def linear(name: str) -> Linear:
            return Linear(*take(name), pack=pack)

        def head_norm(name: str) -> Tensor | None:
            norm = weights.pop(f"{prefix}{name}.weight", None)
            return None if norm is None else interleave(norm, head_dim)

        (q, q_bias), (k, k_bias), (v, v_bias) = (take(f"self_attn.{name}_proj") for name in "qkv")
        bias = None
        if q_bias is not None and k_bias is not None and v_bias is not None:
            bias = torch.cat((interleave(q_bias, head_dim), interleave(k_bias, head_dim), v_bias))
        self.qkv = Linear(torch.cat((interleave(q, head_dim), interleave(k, head_dim), v)), bias, pack=pack)
        self.o = linear("self_attn.o_proj")
        self.gate, self.up, self.down = linear("mlp.gate_proj"), linear("mlp.up_proj"), linear("mlp.down_proj")
        self.input_norm = weights.pop(f"{prefix}input_layernorm.weight")
        self.post_norm = weights.pop(f"{prefix}post_attention_layernorm.weight")
        self.q_norm, self.k_norm = head_norm("self_attn.q_norm"), head_norm("self_attn.k_norm")


class KVPool:
    """K and V of every token slot: [layers, slots, kv heads, head dim], uninitialised."""

    def __init__(self, config: ModelConfig, num_slots: int, dtype: torch.dtype) -> None:
        shape = (config.num_layers, num_slots, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype)
        self.v = torch.empty(shape, dtype=dtype)

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class Decoder:
    """A model on the CPU, ready to run; ``dtype`` is what it computes in."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        context_length: int,
    ) -> None:
        self.config = config
        self.dtype = dtype
        pack = packing_pays(dtype)
        held: dict[str, Tensor] = {name: tensor.to(dtype) for name, tensor in weights}
        self.embedding = held.pop("model.embed_tokens.weight")
        self.layers = [Layer(held, f"model.layers.{i}.", config.head_dim, pack=pack) for i in range(config.num_layers)]
        self.norm = held.pop("model.norm.weight")
        head = held.pop("lm_head.weight", self.embedding)
        self.head = Linear(head, pack=pack)
        self._head_rows = None if pack and head is not self.embedding else head  # packed, its rows cannot be read
        self._rope = rope_table(config, context_length).unsqueeze(1)

    @property
    def reads_candidates(self) -> bool:
        """Whether ``forward`` can compute the logits of candidates only."""
        return self._head_rows is not None

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: KVPool, candidates: Tensor | None = None) -> Tensor:
        """Writes the K/V of all T tokens and returns the logits [S, vocabulary] of ``batch.last``, float32.

        candidates: int64 [S, most], or -1: only their logits are computed, [S, most]; any number where there is none.

        In each layer the K/V of every token are written before any query reads, so that rows of one step may
        share a prefix that this very step computes.
        """
        x = self._layers_over(batch, pool)
        if not len(batch.last):
            return x.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        hidden = rms_norm(x.index_select(0, batch.last), self.norm, self.config.rms_norm_eps)
        if candidates is None:
            return self.head(hidden).float()
        assert self._head_rows is not None
        # rows of a call have most of their candidates in common
        tokens, places = torch.unique(candidates.clamp(min=0), return_inverse=True)
        return F.linear(hidden, self._head_rows[tokens]).float().gather(1, places)

    @torch.inference_mode()
    def states(self, batch: StepBatch, pool: KVPool) -> Tensor:
        """The hidden states of all T tokens behind the last norm, [T, hidden], in place of logits."""
        return rms_norm(self._layers_over(batch, pool), self.norm, self.config.rms_norm_eps)

    def _layers_over(self, batch: StepBatch, pool: KVPool) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        rope = self._rope.index_select(0, batch.positions)
        x = F.embedding(batch.tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(rms_norm(x, layer.input_norm, eps)).view(-1, heads + 2 * kv_heads, dim)
            qk = qkv[:, : heads + kv_heads]
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = qk[:, :heads], qk[:, heads:]
                qk = torch.cat((rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)), dim=1)
            qk = rotate(qk, rope)
            k_pool, v_pool = pool.k[index], pool.v[index]
            k_pool.index_copy_(0, batch.slots, qk[:, heads:])
            v_pool.index_copy_(0, batch.slots, qkv[:, heads + kv_heads :])
            x += layer.o(batch.attention.run(qk[:, :heads], k_pool, v_pool))
            normed = rms_norm(x, layer.post_norm, eps)
            x += layer.down(F.silu(layer.gate(normed), inplace=True).mul_(layer.up(normed)))
        return x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, in float32 inside."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (wide * scale).to(x.dtype)
    return normed.mul_(weight)


def as_index(values: npt.NDArray[np.int64]) -> Tensor:
    """A torch int64 index from numpy, without a copy where possible."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
