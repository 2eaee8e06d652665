"""The shape of a decoder, apart from where its weights came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-family decoder (Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 dense).

    Names and meanings are those of Hugging Face's config.json. ``qk_norm`` is Qwen3's RMSNorm over each
    head of q and k; ``qkv_bias`` is Qwen2's bias; ``rope_scaling`` is the raw config entry or None;
    ``eos_ids`` are all ids that end an answer.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    context_length: int
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
