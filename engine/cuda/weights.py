"""A decoder's weights on a GPU: q, k and v one matrix, gate and up another, streamed there tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spark_llm.engine.cuda.linear import Linear, make_linear
from spark_llm.engine.model.config import ModelConfig


class LayerWeights:
    """Weights of one decoder layer, in Hugging Face's order of rotary pairs (i with i + D / 2)."""

    __slots__ = ("down", "gate_up", "input_norm", "k_norm", "o", "post_norm", "q_norm", "qkv")

    def __init__(self, held: dict[str, Tensor], prefix: str, quantization: str) -> None:
        def take(*names: str) -> Linear:
            weights = [held.pop(f"{prefix}{name}.weight") for name in names]
            biases = [held.pop(f"{prefix}{name}.bias", None) for name in names]
            joined = weights[0] if len(weights) == 1 else torch.cat(weights)
            del weights
            present = [bias for bias in biases if bias is not None]
            return make_linear(joined, torch.cat(present) if len(present) == len(biases) else None, quantization)

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

    quantization ``fp8``: the layers' products in e4m3 with a scale per output channel; embedding and LM head stay.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        quantization: str = "none",
    ) -> None:
        layers: list[LayerWeights | None] = [None] * config.num_layers
        parts: dict[int, dict[str, Tensor]] = {}
        wanted = _tensors_per_layer(config)
        rest: dict[str, Tensor] = {}
        for name, tensor in weights:
            on_device = tensor.to(device=device, dtype=dtype, non_blocking=True)
            if not name.startswith("model.layers."):
                rest[name] = on_device
                continue
            index = int(name.split(".")[2])
            held = parts.setdefault(index, {})
            held[name] = on_device
            if len(held) == wanted:  # joined as soon as it is whole: no second copy of the model at any time
                layers[index] = LayerWeights(parts.pop(index), f"model.layers.{index}.", quantization)
        self.layers: list[LayerWeights] = [layer for layer in layers if layer is not None]
        assert len(self.layers) == config.num_layers, "the loader checks that no tensor is missing"
        self.embedding = rest["model.embed_tokens.weight"]
        self.norm = rest["model.norm.weight"]
        self.head = rest.get("lm_head.weight", self.embedding)


def _tensors_per_layer(config: ModelConfig) -> int:
    return 9 + 3 * config.qkv_bias + config.o_bias + 3 * config.mlp_bias + 2 * config.qk_norm
