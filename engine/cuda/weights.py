"""A decoder's weights on a GPU: q, k and v one matrix, gate and up another, streamed there tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spark_llm.engine.cuda.linear import DenseLinear, Linear, MakeLinear
from spark_llm.engine.cuda.shards import Shards
from spark_llm.engine.model.config import ModelConfig


class LayerWeights:
    """Weights of one decoder layer, in Hugging Face's order of rotary pairs (i with i + D / 2)."""

    __slots__ = ("down", "gate_up", "input_norm", "k_norm", "o", "post_norm", "q_norm", "qkv")

    def __init__(self, held: dict[str, Tensor], prefix: str, make: MakeLinear) -> None:
        def take(*names: str) -> Linear:
            weights = [held.pop(f"{prefix}{name}.weight") for name in names]
            biases = [held.pop(f"{prefix}{name}.bias", None) for name in names]
            joined = weights[0] if len(weights) == 1 else torch.cat(weights)
            del weights
            present = [bias for bias in biases if bias is not None]
            return make(joined, torch.cat(present) if len(present) == len(biases) else None)

        self.qkv = take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.o = take("self_attn.o_proj")
        self.gate_up = take("mlp.gate_proj", "mlp.up_proj")
        self.down = take("mlp.down_proj")
        self.input_norm = held.pop(f"{prefix}input_layernorm.weight")
        self.post_norm = held.pop(f"{prefix}post_attention_layernorm.weight")
        self.q_norm = held.pop(f"{prefix}self_attn.q_norm.weight", None)
        self.k_norm = held.pop(f"{prefix}self_attn.k_norm.weight", None)


class DeviceWeights:
    """All weights of a model on ``device`` in ``dtype``; each tensor is on the CPU only while it is copied.

    shards: what of the model this is; ``weights`` are those parts. layer, head: make the products of the layers and of
    the LM head.
    """

    def __init__(
        self,
        shards: Shards,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        layer: MakeLinear = DenseLinear,
        head: MakeLinear = DenseLinear,
    ) -> None:
        config = shards.config
        layers: list[LayerWeights | None] = [None] * config.num_layers
        parts: dict[int, dict[str, Tensor]] = {}
        wanted = _tensors_per_layer(config)
        rest: dict[str, Tensor] = {}
        for name, tensor in weights:
            on_device = tensor.to(device=device, dtype=dtype, non_blocking=True)
            if not name.startswith("model.layers."):
                rest[name] = on_device
                continue
            if not shards.adds_bias(name):
                on_device = torch.zeros_like(on_device)
            index = int(name.split(".")[2])
            held = parts.setdefault(index, {})
            held[name] = on_device
            if len(held) == wanted:  # joined as soon as it is whole: no second copy of the model at any time
                layers[index] = LayerWeights(parts.pop(index), f"model.layers.{index}.", layer)
        self.layers: list[LayerWeights] = [whole for whole in layers if whole is not None]
        assert len(self.layers) == config.num_layers, "the loader checks that no tensor is missing"
        self.embedding = rest["model.embed_tokens.weight"]
        self.norm = rest["model.norm.weight"]
        tied = self.embedding[shards.vocabulary]
        self.head: Linear = head(rest.get("lm_head.weight", tied), None)


def _tensors_per_layer(config: ModelConfig) -> int:
    return 9 + 3 * config.qkv_bias + config.o_bias + 3 * config.mlp_bias + 2 * config.qk_norm
