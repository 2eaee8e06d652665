"""The BERT-family encoder in plain torch: one forward pass over a batch of texts, padded to the longest of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from spark_llm.engine.encoder.config import EncoderConfig
from spark_llm.engine.encoder.pooling import pooled
from spark_llm.engine.model.linear import Linear, packing_pays

_Part = tuple[Tensor, Tensor]  # weight and bias


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape, under the file's names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.num_positions, hidden),
        "embeddings.token_type_embeddings.weight": (config.num_types, hidden),
    }
    matrices = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    matrices["attention.output.dense"] = (hidden, hidden)
    matrices["intermediate.dense"] = (inner, hidden)
    matrices["output.dense"] = (hidden, inner)
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{number}." for number in range(config.num_layers)):
        for name, shape in matrices.items():
            shapes[f"{layer}{name}.weight"] = shape
            shapes[f"{layer}{name}.bias"] = shape[:1]
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
    return {config.prefix + name: shape for name, shape in shapes.items()}


class _Layer:
    """Weights of one layer; query, key and value are one product."""

    def __init__(self, held: dict[str, Tensor], prefix: str, *, pack: bool) -> None:
        def take(name: str) -> _Part:
            return held.pop(f"{prefix}{name}.weight"), held.pop(f"{prefix}{name}.bias")

        weights, biases = zip(*(take(f"attention.self.{name}") for name in ("query", "key", "value")), strict=True)
        self.qkv = Linear(torch.cat(weights), torch.cat(biases), pack=pack)
        self.out = Linear(*take("attention.output.dense"), pack=pack)
        self.up = Linear(*take("intermediate.dense"), pack=pack)
        self.down = Linear(*take("output.dense"), pack=pack)
        self.out_norm, self.norm = take("attention.output.LayerNorm"), take("output.LayerNorm")


class Encoder:
    """A model on one device, ready to run in ``dtype``. weights: those that ``encoder_shapes`` names."""

    def __init__(self, config: EncoderConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self.config = config
        self.name, self.vocab_size, self.width = config.name, config.vocab_size, config.hidden_size
        self.window, self.head = config.window, config.head
        held = {name.removeprefix(config.prefix): tensor.to(dtype) for name, tensor in weights}
        self._words = held.pop("embeddings.word_embeddings.weight")
        self.device = self._words.device
        # all tokens are of the first type: it belongs to their positions
        types = held.pop("embeddings.token_type_embeddings.weight")
        self._places = held.pop("embeddings.position_embeddings.weight")[config.position_offset :] + types[0]
        self._norm = held.pop("embeddings.LayerNorm.weight"), held.pop("embeddings.LayerNorm.bias")
        pack = self.device.type == "cpu" and packing_pays(dtype)
        self._layers = [_Layer(held, f"encoder.layer.{number}.", pack=pack) for number in range(config.num_layers)]

    @torch.inference_mode()
    def embed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """float32 [rows, width] on the CPU: the texts' vectors.

        tokens: int64 [rows, most tokens], any valid id where a text has ended; lengths: int64 [rows].
        """
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)
        rows, most = tokens.shape
        config = self.config
        mask = None
        if not bool((lengths == most).all()):
            mask = (torch.arange(most, device=self.device) < lengths[:, None])[:, None, None, :]
        x = self._normed(F.embedding(tokens, self._words) + self._places[:most], self._norm)
        for layer in self._layers:
            qkv = layer.qkv(x).view(rows, most, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
            seen = seen.transpose(1, 2).reshape(rows, most, config.hidden_size)
            x = self._normed(layer.out(seen) + x, layer.out_norm)
            x = self._normed(layer.down(self._activated(layer.up(x))) + x, layer.norm)
        return pooled(x, lengths, self.head).cpu()

    def _normed(self, x: Tensor, norm: _Part) -> Tensor:
        return F.layer_norm(x, (self.config.hidden_size,), *norm, self.config.norm_eps)

    def _activated(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.config.activation == "relu" else F.gelu(x, approximate=self.config.activation)
