"""From a spec to an engine that embeds: device, weights, tokenizer."""

from __future__ import annotations

import logging

import torch

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.cuda.device import choose_device, device_dtype, device_of_instance
from spark_llm.engine.encoder.config import load_encoder_config, load_head
from spark_llm.engine.encoder.decoder import DecoderEmbedder
from spark_llm.engine.encoder.engine import Embedder, EncoderEngine
from spark_llm.engine.encoder.model import Encoder, encoder_shapes
from spark_llm.engine.encoder.text import EncoderText
from spark_llm.engine.model.loader import iter_tensors, iter_weights
from spark_llm.engine.model.read_config import ARCHITECTURES, architecture_of, load_config, read_json
from spark_llm.engine.model.source import ModelSource, resolve
from spark_llm.engine.text.tokenizer import load_tokenizer
from spark_llm.errors import LlmError

log = logging.getLogger(__name__)


def load_encoder(spec: EngineSpec) -> EncoderEngine:
    """The engine of a spec whose task is ``embed``. What is about generating in the spec means nothing.

    LlmError: the model, its tokenizer or the device is not there, or the model makes no vectors.
    """
    if spec.threads:
        torch.set_num_threads(spec.threads)
    device = choose_device(device_of_instance(spec.device, spec.instance, 1), "none")
    source = resolve(spec.model, "embed")
    model, label = _load(spec, source, device)
    loaded = load_tokenizer(source)
    if (found := loaded.tokenizer.get_vocab_size(with_added_tokens=False)) > model.vocab_size:
        reason = f"the tokenizer has {found} tokens, the model {model.vocab_size}"
        raise LlmError("LLM_TOKENIZER_MISSING", model=source.name, reason=reason)
    window = min(spec.context_length or model.window, model.window)
    text = EncoderText(loaded.tokenizer, source.name, window, model.head)
    log.info("model %s: %s weights on %s, %s, %d tokens a text", source.name, label, model.device, model.head, window)
    return EncoderEngine(spec, model, text, label)


def _load(spec: EngineSpec, source: ModelSource, device: torch.device) -> tuple[Embedder, str]:
    """The model, and what its weights are rounded to."""
    if not _is_encoder(source):
        return _decoder(spec, source, device)
    config = load_encoder_config(source)
    stored, computed = _dtypes(spec.dtype, device)
    weights = iter_tensors(source, encoder_shapes(config), stored, device)
    return Encoder(config, weights, computed), str(stored).removeprefix("torch.")


def _is_encoder(source: ModelSource) -> bool:
    """False for decoders; what is neither is left to the encoders' reader to refuse."""
    if source.kind == "gguf":
        return False
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    return architecture_of(read_json(path, source.name) or {}) not in ARCHITECTURES


def _decoder(spec: EngineSpec, source: ModelSource, device: torch.device) -> tuple[Embedder, str]:
    if device.type != "cpu" and spec.device != "auto":
        reason = f"{source.name} is a decoder, which makes embeddings on the CPU only"
        raise LlmError("LLM_DEVICE_NOT_AVAILABLE", device=spec.device, reason=reason)
    config = load_config(source)
    stored, computed = _dtypes(spec.dtype, torch.device("cpu"))
    weights = iter_weights(source, stored, config)
    model = DecoderEmbedder(config, load_head(source), weights, computed, spec.context_length)
    return model, str(stored).removeprefix("torch.")


def _dtypes(requested: str, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What weights are rounded to, and what is computed in: on a CPU float32, which is fast enough for encoders."""
    if device.type != "cpu":
        dtype = device_dtype(requested, device)
        return dtype, dtype
    return torch.float32 if requested == "auto" else getattr(torch, requested), torch.float32
