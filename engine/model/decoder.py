"""The Llama-family decoder in plain torch: one forward pass over the tokens of a step and the paged K/V pool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spark_llm.engine.model.attention import StepAttention
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.linear import Linear, packing_pays
from spark_llm.engine.model.rope import rope_tables, rotate


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
    """Weights of one decoder layer; q, k, v and gate, up are one product each."""

    __slots__ = ("down", "gate_up", "input_norm", "k_norm", "o", "post_norm", "q_norm", "qkv")

    def __init__(self, weights: dict[str, Tensor], prefix: str, *, pack: bool) -> None:
        def linear(*names: str) -> Linear:
            parts = [weights.pop(f"{prefix}{name}.weight") for name in names]
            biases = [weights.pop(f"{prefix}{name}.bias", None) for name in names]
            bias = None
            if any(b is not None for b in biases):
                bias = torch.cat(
                    [b if b is not None else w.new_zeros(len(w)) for b, w in zip(biases, parts, strict=True)]
                )
            return Linear(torch.cat(parts) if len(parts) > 1 else parts[0], bias, pack=pack)

        self.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = linear("self_attn.o_proj")
        self.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        self.down = linear("mlp.down_proj")
        self.input_norm = weights.pop(f"{prefix}input_layernorm.weight")
        self.post_norm = weights.pop(f"{prefix}post_attention_layernorm.weight")
        self.q_norm = weights.pop(f"{prefix}self_attn.q_norm.weight", None)
        self.k_norm = weights.pop(f"{prefix}self_attn.k_norm.weight", None)


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
        self.layers = [Layer(held, f"model.layers.{i}.", pack=pack) for i in range(config.num_layers)]
        self.norm = held.pop("model.norm.weight")
        self.head = Linear(held.pop("lm_head.weight", self.embedding), pack=pack)
        cos, sin = rope_tables(config, context_length)
        self._cos, self._sin = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: KVPool) -> Tensor:
        """Writes the K/V of all T tokens and returns the logits [S, vocabulary] of ``batch.last``, float32.

        In each layer the K/V of every token are written before any query reads, so that rows of one step may
        share a prefix that this very step computes.
        """
        config, eps = self.config, self.config.rms_norm_eps
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        x = F.embedding(batch.tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(rms_norm(x, layer.input_norm, eps)).view(-1, heads + 2 * kv_heads, dim)
            qk = qkv[:, : heads + kv_heads]
            if layer.q_norm is not None and layer.k_norm is not None:
                qk = torch.cat(
                    (rms_norm(qk[:, :heads], layer.q_norm, eps), rms_norm(qk[:, heads:], layer.k_norm, eps)),
                    dim=1,
                )
            qk = rotate(qk, cos, sin)
            k_pool, v_pool = pool.k[index], pool.v[index]
            k_pool.index_copy_(0, batch.slots, qk[:, heads:])
            v_pool.index_copy_(0, batch.slots, qkv[:, heads + kv_heads :])
            attended = batch.attention.run(qk[:, :heads], k_pool, v_pool)
            x = x + layer.o(attended)
            gate, up = layer.gate_up(rms_norm(x, layer.post_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        hidden = rms_norm(x[batch.last], self.norm, eps)
        return self.head(hidden).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, in float32 inside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def as_index(values: np.ndarray) -> Tensor:  # type: ignore[type-arg]
    """A torch int64 index from numpy, without a copy where possible."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
