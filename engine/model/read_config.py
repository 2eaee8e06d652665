"""Reads a ModelConfig out of a Hugging Face folder or a GGUF header. Holds no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.gguf import GgufFile, open_gguf
from spark_llm.engine.model.source import ModelSource
from spark_llm.errors import LlmError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# encoders, which engine/encoder computes, and what their tensors' names begin with
ENCODERS = {
    "BertModel": "",
    "BertForMaskedLM": "bert.",
    "RobertaModel": "",
    "RobertaForMaskedLM": "roberta.",
    "XLMRobertaModel": "",
    "XLMRobertaForMaskedLM": "roberta.",
}
_GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Chat models end a turn with one of these; generation_config.json often names only the end of text.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
_GGUF_CONTROL_TOKEN = 3


def load_config(source: ModelSource) -> ModelConfig:
    """The model's shape. Raises LLM_MODEL_UNSUPPORTED, LLM_MODEL_CORRUPT, or LLM_MODEL_TASK_MISMATCH for an encoder."""
    if source.kind == "gguf":
        return _from_gguf(source, open_gguf(source.path))
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    raw = read_json(path, source.name)
    if raw is None:
        raise _corrupt(source.name, f"{path.name} is missing")
    try:
        return _from_json(source, raw)
    except KeyError as error:
        raise _corrupt(source.name, f"{path.name} has no entry {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise _corrupt(source.name, f"{path.name} has an entry of the wrong type: {error}") from error


def read_json(path: Path, name: str) -> dict[str, Any] | None:
    """The object in ``path``, None where there is no such file. Raises LLM_MODEL_CORRUPT for broken JSON."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _corrupt(name, f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise _corrupt(name, f"{path.name} is not a JSON object")
    return value


def _from_json(source: ModelSource, raw: Mapping[str, Any]) -> ModelConfig:
    architecture = architecture_of(raw)
    if architecture in ENCODERS:
        raise LlmError(
            "LLM_MODEL_TASK_MISMATCH",
            model=source.name,
            task="generate answers",
            reason=f"it is an encoder ({architecture}), which makes vectors of texts",
            remedy="Use it for embeddings, or take a model that generates",
        )
    if architecture not in ARCHITECTURES:
        raise _unsupported(source, architecture)
    if quantisation := raw.get("quantization_config"):
        method = quantisation.get("quant_method", "unknown")
        raise _unsupported(source, f"{architecture} with {method} quantised weights")
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise _unsupported(source, f"{architecture} with activation {activation}")
    num_heads = int(raw["num_attention_heads"])
    rope_theta, rope_scaling = _rope(source, architecture, raw)
    qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    head_dim = 128 if qwen3 else int(raw["hidden_size"]) // num_heads  # transformers' defaults
    attention_bias = bool(raw.get("attention_bias", False)) and architecture != "MistralForCausalLM"
    config = ModelConfig(
        name=source.name,
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or head_dim),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        context_length=int(raw["max_position_embeddings"]),
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qwen2 or attention_bias,
        o_bias=attention_bias and not qwen2,
        mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "LlamaForCausalLM",
        qk_norm=qwen3,
        sliding_window=_sliding_window(source, architecture, raw),
        eos_ids=_eos_from_folder(source, raw),
    )
    return _checked(source, config)


def architecture_of(raw: Mapping[str, Any]) -> str:
    """What a config.json says that the model is."""
    return str(next(iter(raw.get("architectures") or ()), raw.get("model_type", "unknown")))


def _rope(source: ModelSource, architecture: str, raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """theta and the scaling entry (always with ``rope_type``), from transformers 4's or 5's layout."""
    entry = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(entry.pop("rope_theta", None) or raw.get("rope_theta") or 10_000.0)
    entry["rope_type"] = entry.pop("type", None) or entry.get("rope_type") or "default"
    rotary = entry.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if float(rotary) != 1.0:
        raise _unsupported(source, f"{architecture} with partial rotary embeddings")
    return theta, None if entry["rope_type"] == "default" else entry


def _sliding_window(source: ModelSource, architecture: str, raw: Mapping[str, Any]) -> int | None:
    window = raw.get("sliding_window", 4096)  # as MistralConfig; null is none
    if architecture == "LlamaForCausalLM" or not window:
        return None
    if architecture == "MistralForCausalLM":
        return int(window)
    if not raw.get("use_sliding_window", False):
        return None
    num_layers = int(raw["num_hidden_layers"])
    first = int(raw.get("max_window_layers", 28))
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if len(set(kinds)) > 1:
        raise _unsupported(source, f"{architecture} with a sliding window in some layers only")
    return int(window) if kinds[0] == "sliding_attention" else None


def _eos_from_folder(source: ModelSource, raw: Mapping[str, Any]) -> tuple[int, ...]:
    folder = source.path.parent if source.kind == "dummy" else source.path
    generation = read_json(folder / "generation_config.json", source.name) or {}
    tokenizer = read_json(folder / "tokenizer_config.json", source.name) or {}
    template = tokenizer.get("chat_template") or ""
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    added = (read_json(folder / "tokenizer.json", source.name) or {}).get("added_tokens") or ()
    special = {token["content"]: int(token["id"]) for token in added if token.get("special")}
    named = [special[name] for name in _END_OF_TURN if name in special and name in str(template)]
    return _unique(_ids(generation.get("eos_token_id")), _ids(raw.get("eos_token_id")), named)


def _ids(value: Any) -> list[int]:
    return [] if value is None else [int(item) for item in (value if isinstance(value, list) else [value])]


def _unique(*groups: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for group in groups for token in group if token >= 0))


def _from_gguf(source: ModelSource, file: GgufFile) -> ModelConfig:
    architecture = _GGUF_ARCHITECTURES.get(file.architecture)
    if architecture is None or file.get("expert_count", 0):
        experts = " with experts" if file.get("expert_count", 0) else ""
        raise _unsupported(source, (file.architecture or "unknown") + experts)

    def need(key: str) -> Any:
        value = file.get(key)
        if value is None:
            raise _corrupt(source.name, f"the metadata has no {file.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise _unsupported(source, f"{architecture} with layers of different {key}")
            value = value[0]
        return value

    if "token_embd.weight" not in file.tensors:
        raise _corrupt(source.name, "tensor token_embd.weight is missing")
    num_heads, hidden_size = int(need("attention.head_count")), int(need("embedding_length"))
    head_dim = int(file.get("attention.key_length") or hidden_size // num_heads)
    if int(file.get("rope.dimension_count") or head_dim) != head_dim:
        raise _unsupported(source, f"{architecture} with partial rotary embeddings")
    config = ModelConfig(
        name=source.name,
        architecture=architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=int(need("feed_forward_length")),
        num_layers=int(need("block_count")),
        num_heads=num_heads,
        num_kv_heads=int(need("attention.head_count_kv")) if file.get("attention.head_count_kv") else num_heads,
        head_dim=head_dim,
        rms_norm_eps=_shortest(need("attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(file.get("rope.freq_base", 10_000.0)),
        context_length=int(need("context_length")),
        rope_scaling=_gguf_rope_scaling(source, file, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=file.get("attention.sliding_window") or None,
        eos_ids=_eos_from_gguf(file),
    )
    return _checked(source, config)


def _shortest(value: float) -> float:
    """GGUF keeps float32, config.json the decimal it came from: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def _gguf_rope_scaling(source: ModelSource, file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(source, file, head_dim)
    kind = file.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    entry: dict[str, Any] = {"rope_type": kind, "factor": float(file.get("rope.scaling.factor", 1.0))}
    if original := file.get("rope.scaling.original_context_length"):
        entry["original_max_position_embeddings"] = int(original)
    return entry


def _llama3_scaling(source: ModelSource, file: GgufFile, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, which llama.cpp stores as its result: a divisor per frequency."""
    divisors = file.read(file.tensors["rope_freqs.weight"]).astype(np.float64).ravel()
    theta = float(file.get("rope.freq_base", 10_000.0))
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    smooth = np.clip((original * frequency / (2 * math.pi) - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise _unsupported(source, f"{file.architecture} with an unknown rope_freqs.weight")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _eos_from_gguf(file: GgufFile) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [file.metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in file.metadata]
    template = str(file.metadata.get("tokenizer.chat_template", ""))
    wanted = {name for name in _END_OF_TURN if name in template}
    kinds = file.metadata.get("tokenizer.ggml.token_type") or ()
    pairs = enumerate(zip(file.metadata.get("tokenizer.ggml.tokens") or (), kinds, strict=False))
    turn = [token for token, (text, kind) in pairs if text in wanted and kind == _GGUF_CONTROL_TOKEN]
    return _unique(_ids(named), turn)


def _checked(source: ModelSource, config: ModelConfig) -> ModelConfig:
    sizes = (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.head_dim,
    )
    if min(*sizes, config.num_heads, config.num_kv_heads, config.context_length) <= 0:
        raise _corrupt(source.name, "its configuration has a size that is not positive")
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        reason = f"{config.num_heads} heads of {config.head_dim} do not share {config.num_kv_heads} K/V heads"
        raise _corrupt(source.name, reason)
    return config


def unsupported_weights(source: ModelSource, type_: gguf.GGMLQuantizationType) -> LlmError:
    """The error for a quantisation that cannot be undone here."""
    return _unsupported(source, f"GGUF with {type_.name} weights")


def _unsupported(source: ModelSource, architecture: str) -> LlmError:
    return LlmError(
        "LLM_MODEL_UNSUPPORTED",
        model=source.name,
        architecture=architecture,
        supported=", ".join(ARCHITECTURES),
    )


def _corrupt(name: str, reason: str) -> LlmError:
    return LlmError("LLM_MODEL_CORRUPT", model=name, reason=reason)
