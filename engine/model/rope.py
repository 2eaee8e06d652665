"""Rotary position embedding tables (RoFormer, arXiv 2104.09864) with the scalings of the supported models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spark_llm.engine.model.config import ModelConfig
from spark_llm.errors import LlmError


def rope_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [length, head_dim / 2]. LLM_MODEL_UNSUPPORTED for an unknown scaling."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif kind == "factors":  # per-frequency divisors, as GGUF files carry them
        frequencies = frequencies / torch.as_tensor(scaling["factors"], dtype=torch.float32)
    elif kind != "default":
        raise LlmError(
            "LLM_MODEL_UNSUPPORTED",
            model=config.name,
            architecture=f"{config.architecture} with rope scaling {kind}",
            supported="rope scaling default, linear and llama3",
        )
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, D] (halves layout, as Hugging Face stores it); cos, sin: [T, 1, D / 2] of x's dtype."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
