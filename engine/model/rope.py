"""Rotary position embedding tables (RoFormer, arXiv 2104.09864) with the scalings of the supported models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spark_llm.engine.model.config import ModelConfig
from spark_llm.errors import LlmError


def rope_table(config: ModelConfig, length: int) -> Tensor:
    """e^(i * angle) of each position and frequency: complex64 [length, head_dim / 2]. See ``frequencies``."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(config))
    return torch.polar(torch.ones_like(angles), angles)


def frequencies(config: ModelConfig) -> Tensor:
    """Angle a position, scaled as the model says: float32 [head_dim / 2].

    LLM_MODEL_UNSUPPORTED for an unknown scaling.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind == "linear":
        return plain / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(plain, scaling)
    if kind == "factors":  # per-frequency divisors, as GGUF files carry them
        return plain / torch.as_tensor(scaling["factors"], dtype=torch.float32)
    if kind != "default":
        raise LlmError(
            "LLM_MODEL_UNSUPPORTED",
            model=config.name,
            architecture=f"{config.architecture} with rope scaling {kind}",
            supported="rope scaling default, linear and llama3",
        )
    return plain


def _llama3(frequencies: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, a band between is blended."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    medium = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(medium, blended, scaled)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a q or k projection, bias or head norm so that each rotated pair lies side by side.

    Hugging Face pairs i with i + head_dim / 2. Scores do not change as long as q and k agree; with pairs side
    by side a rotation is one complex product. weight: [heads * head_dim, ...], same shape back.
    """
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: [T, heads, D], interleaved; table: complex64 [T, 1, D / 2]. Contiguous, of x's dtype."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
