"""Reads what an encoder is out of a Hugging Face folder, as sentence-transformers lays it out. Holds no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from spark_llm.engine.config import Task
from spark_llm.engine.model.read_config import ARCHITECTURES, ENCODERS, architecture_of, read_json
from spark_llm.engine.model.source import ModelSource
from spark_llm.errors import LlmError

Pooling = Literal["mean", "cls", "max", "lasttoken"]
_ACTIVATIONS = {"gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "relu": "relu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What makes one vector of a text's hidden states, and which texts there may be.

    window: most tokens of a text, special ones included; None: as many as the model has positions. lowercase: texts
    become lower case before the tokenizer sees them. prompt: what is put before every text.
    """

    pooling: Pooling = "mean"
    normalize: bool = False
    window: int | None = None
    lowercase: bool = False
    prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """A BERT-like encoder: learned positions, layer norm after each part.

    prefix: what stands before tensors' names. position_offset: of the first token; the RoBERTa family keeps those
    before for padding. activation: "relu", or how GELU is approximated. window: most tokens of a text.
    """

    name: str
    prefix: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    num_types: int
    position_offset: int
    norm_eps: float
    activation: str
    pad_id: int
    head: Head

    @property
    def window(self) -> int:
        """Most tokens of a text, special ones included."""
        positions = self.num_positions - self.position_offset
        return positions if self.head.window is None else min(positions, self.head.window)


def natural_task(source: ModelSource) -> Task:
    """What a model is for, as far as its files tell: encoders, and what sentence-transformers has laid out, embed."""
    if source.kind == "gguf":
        return "generate"
    folder, path = source.path.parent, source.path
    if source.kind == "folder":
        folder, path = source.path, source.path / "config.json"
    is_encoder = architecture_of(read_json(path, source.name) or {}) in ENCODERS
    return "embed" if is_encoder or (folder / "modules.json").is_file() else "generate"


def load_encoder_config(source: ModelSource) -> EncoderConfig:
    """The shape of an encoder. Raises LLM_MODEL_UNSUPPORTED, LLM_MODEL_CORRUPT."""
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    raw = read_json(path, source.name)
    if raw is None:
        raise _corrupt(source, f"{path.name} is missing")
    try:
        return _checked(source, _from_json(source, raw))
    except KeyError as error:
        raise _corrupt(source, f"{path.name} has no entry {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise _corrupt(source, f"{path.name} has an entry of the wrong type: {error}") from error


def _from_json(source: ModelSource, raw: Mapping[str, Any]) -> EncoderConfig:
    architecture = architecture_of(raw)
    if architecture not in ENCODERS:
        raise _unsupported(source, architecture)
    activation = str(raw.get("hidden_act", "gelu"))
    if activation not in _ACTIVATIONS:
        raise _unsupported(source, f"{architecture} with activation {activation}")
    positions = raw.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise _unsupported(source, f"{architecture} with {positions} positions")
    is_bert = architecture.startswith("Bert")
    pad_id = int(raw["pad_token_id"]) if raw.get("pad_token_id") is not None else (0 if is_bert else 1)
    return EncoderConfig(
        name=source.name,
        prefix=ENCODERS[architecture],
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=int(raw["num_attention_heads"]),
        num_positions=int(raw["max_position_embeddings"]),
        num_types=int(raw.get("type_vocab_size", 2)),
        position_offset=0 if is_bert else pad_id + 1,
        norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        activation=_ACTIVATIONS[activation],
        pad_id=pad_id,
        head=load_head(source),
    )


def load_head(source: ModelSource) -> Head:
    """How texts' vectors are made, by ``modules.json``; without it, or of a GGUF file: the mean, as it is.

    Raises LLM_MODEL_UNSUPPORTED for modules that are not known, LLM_MODEL_CORRUPT.
    """
    if source.kind == "gguf":
        return Head()
    folder = source.path if source.kind == "folder" else source.path.parent
    modules = _modules(source, folder)
    limits = read_json(folder / "sentence_bert_config.json", source.name) or {}
    window = limits.get("max_seq_length")
    pooling: Pooling = "mean"
    for kind, path in modules.items():
        if kind == "Pooling":
            pooling = _pooling(source, read_json(folder / path / "config.json", source.name) or {})
        elif kind not in ("Transformer", "Normalize"):
            raise _unsupported(source, f"a module {kind}")
    return Head(
        pooling=pooling,
        normalize="Normalize" in modules,
        window=None if window is None else int(window),
        lowercase=bool(limits.get("do_lower_case", False)),
        prompt=_prompt(source, folder),
    )


def _prompt(source: ModelSource, folder: Path) -> str:
    raw = read_json(folder / "config_sentence_transformers.json", source.name) or {}
    name = raw.get("default_prompt_name")
    prompts = raw.get("prompts") or {}
    if name is not None and name not in prompts:
        raise _corrupt(source, f"config_sentence_transformers.json has no prompt {name!r}")
    return "" if name is None else str(prompts[name])


def _modules(source: ModelSource, folder: Path) -> dict[str, str]:
    """Kind -> subfolder, in their order; of a folder without ``modules.json`` none."""
    try:
        listed = json.loads((folder / "modules.json").read_text("utf-8"))
        return {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _corrupt(source, f"modules.json cannot be read: {type(error).__name__}: {error}") from error


def _pooling(source: ModelSource, raw: Mapping[str, Any]) -> Pooling:
    if raw.get("include_prompt", True) is False:
        raise _unsupported(source, "pooling without the prompt")
    flag = "pooling_mode_"
    asked = [str(raw["pooling_mode"])] if isinstance(raw.get("pooling_mode"), str) else []
    asked += [
        name.removeprefix(flag).removesuffix("_tokens") for name, on in raw.items() if name.startswith(flag) and on
    ]
    known = [name.removesuffix("_token") if name == "cls_token" else name for name in asked] or ["mean"]
    if len(known) != 1 or known[0] not in get_args(Pooling):
        raise _unsupported(source, f"{' and '.join(known)} pooling")
    return cast(Pooling, known[0])


def _checked(source: ModelSource, config: EncoderConfig) -> EncoderConfig:
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads)
    if min(*sizes, config.num_types, config.window) <= 0 or config.hidden_size % config.num_heads:
        raise _corrupt(
            source, "its configuration has a size that is not positive, or heads that do not share its width"
        )
    return config


def _unsupported(source: ModelSource, what: str) -> LlmError:
    models = ", ".join((*ENCODERS, *ARCHITECTURES))
    supported = f"for embeddings {models}, with mean, cls, max or lasttoken pooling"
    return LlmError("LLM_MODEL_UNSUPPORTED", model=source.name, architecture=what, supported=supported)


def _corrupt(source: ModelSource, reason: str) -> LlmError:
    return LlmError("LLM_MODEL_CORRUPT", model=source.name, reason=reason)
