"""Loads a model's tokenizer, chat template and special tokens from its folder or its GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from spark_llm.engine.model.gguf import open_gguf
from spark_llm.engine.model.read_config import read_json
from spark_llm.engine.model.source import DEFAULT_PACKAGE, ModelSource, packaged_path
from spark_llm.engine.text.gguf_tokenizer import tokenizer_from_gguf
from spark_llm.errors import LlmError

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedTokenizer:
    """A tokenizer and what goes with it.

    chat_template: the jinja source, None for a base model.
    special_tokens: ``bos_token`` and so on, as a chat template sees them.
    """

    name: str
    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]


def load_tokenizer(source: ModelSource) -> LoadedTokenizer:
    """The tokenizer of ``source``; a dummy model without one of its own gets the packaged model's.

    Raises LLM_TOKENIZER_MISSING.
    """
    if source.kind == "gguf":
        return _from_gguf(source.path, source.name)
    folder = source.path.parent if source.kind == "dummy" else source.path
    if source.kind == "dummy" and not (folder / "tokenizer.json").is_file():
        packaged = packaged_path()
        if packaged is None:
            raise _missing(source.name, f"there is no tokenizer.json beside it, and no {DEFAULT_PACKAGE}")
        return _from_gguf(packaged, source.name)
    return _from_folder(folder, source.name)


def _from_folder(folder: Path, name: str) -> LoadedTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [file for file in ("tokenizer.model", "vocab.json") if (folder / file).is_file()]
        hint = f"; convert {others[0]} by AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise _missing(name, f"{path} is missing" + (hint if others else ""))
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot parse
        raise _missing(name, f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json(folder / "tokenizer_config.json", name) or {}
    special = {
        **_special_tokens(read_json(folder / "special_tokens_map.json", name) or {}),
        **_special_tokens(config),
    }
    return LoadedTokenizer(name, tokenizer, _chat_template(folder, config), special)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key in _SPECIAL_NAMES:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[key] = text
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates, as transformers 4 wrote them
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _from_gguf(path: Path, name: str) -> LoadedTokenizer:
    metadata = open_gguf(path).metadata
    tokenizer = tokenizer_from_gguf(metadata, name)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {}
    for key, entry in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{entry}_token_id")
        if token is not None and 0 <= token < len(tokens):
            special[f"{key}_token"] = tokens[token]
    return LoadedTokenizer(name, tokenizer, metadata.get("tokenizer.chat_template"), special)


def _missing(name: str, reason: str) -> LlmError:
    return LlmError("LLM_TOKENIZER_MISSING", model=name, reason=reason)
