"""Streams a model's weights under Hugging Face names, from safetensors, from GGUF, or drawn at random.

One tensor is in memory at a time beyond what the caller keeps; every tensor is checked against the shape
that the configuration promises.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import torch

from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.gguf import hugging_face_name, open_gguf, undo_permutation
from spark_llm.engine.model.read_config import load_config, read_json, unsupported_weights
from spark_llm.engine.model.source import ModelSource
from spark_llm.errors import LlmError

_CPU = torch.device("cpu")
_ALL = (slice(None),)

Part = Callable[[str], tuple[slice, ...]]  # where in the tensor of a name that lies which is wanted

_Shapes = dict[str, tuple[int, ...]]
_Tensors = Iterator[tuple[str, torch.Tensor]]

__all__ = ["expected_shapes", "iter_tensors", "iter_weights", "load_config"]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape; ``lm_head.weight`` only when it is not tied."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, (rows, columns, has_bias) in matrices.items():
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_dim,)
    layer["post_attention_layernorm.weight"] = (hidden,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def iter_weights(
    source: ModelSource,
    dtype: torch.dtype,
    config: ModelConfig | None = None,
    device: torch.device = _CPU,
    part: Part = lambda _: _ALL,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once, or what ``part`` wants of it, on ``device`` in ``dtype``, in the file's order.

    Safetensors are read straight to the device, and random weights drawn there (they differ between kinds of device).
    Of safetensors no more than the part is read.

    Raises LLM_MODEL_CORRUPT, naming the file or tensor, for what is unreadable, missing, not finite or of the
    wrong shape; LLM_MODEL_UNSUPPORTED for a quantisation that cannot be undone.
    """
    config = config or load_config(source)
    shapes = expected_shapes(config)
    if source.kind == "gguf":
        tensors = _from_gguf(source, config, shapes, part)
    else:
        tensors = (_from_folder if source.kind == "folder" else _at_random)(source, shapes, device, part)
    yield from _checked(source, shapes, tensors, dtype, device)


def iter_tensors(
    source: ModelSource, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device = _CPU
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that ``shapes`` names, of a model that is no decoder: a folder's, or drawn at random; as
    ``iter_weights``."""
    reader = _from_folder if source.kind == "folder" else _at_random
    yield from _checked(source, shapes, reader(source, shapes, device, lambda _: _ALL), dtype, device)


def _checked(
    source: ModelSource, shapes: _Shapes, tensors: _Tensors, dtype: torch.dtype, device: torch.device
) -> _Tensors:
    missing = dict.fromkeys(shapes)
    for name, tensor in tensors:
        # The sum is finite only if every element is, and costs one pass at memory speed.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise _corrupt(source, f"tensor {name} holds values that are not finite")
        missing.pop(name, None)
        yield name, tensor.to(device=device, dtype=dtype)
    if missing:
        raise _corrupt(source, f"tensor {next(iter(missing))} is missing ({len(missing)} missing in all)")


def _check_shape(source: ModelSource, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise _corrupt(source, f"tensor {name} has shape {shape} instead of {expected}")


def _from_folder(source: ModelSource, shapes: _Shapes, device: torch.device, part: Part) -> _Tensors:
    for path, names in _files(source, shapes).items():
        if not path.is_file():
            raise _corrupt(source, f"file {path.name} is missing")
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                held = set(file.keys())
                for name in shapes:
                    if name in names and name in held:
                        stored = file.get_slice(name)
                        _check_shape(source, name, tuple(stored.get_shape()), shapes[name])
                        at = part(name)
                        yield name, file.get_tensor(name) if at == _ALL else stored[at]
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise _corrupt(source, f"file {path.name}: {error}") from error


def _files(source: ModelSource, shapes: _Shapes) -> dict[Path, set[str]]:
    """The folder's safetensors files and which wanted tensors each holds."""
    if index := read_json(source.path / "model.safetensors.index.json", source.name):
        files: dict[Path, set[str]] = {}
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict):
            raise _corrupt(source, "model.safetensors.index.json has no weight_map")
        for name, file in weight_map.items():
            if name in shapes:
                files.setdefault(source.path / str(file), set()).add(name)
        return files
    found = sorted(source.path.glob("*.safetensors"))
    single = source.path / "model.safetensors"
    if single in found or not found:
        found = [single]
    return {path: set(shapes) for path in found}


def _from_gguf(source: ModelSource, config: ModelConfig, shapes: _Shapes, part: Part) -> _Tensors:
    file = open_gguf(source.path)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    for tensor in file.tensors.values():
        name = hugging_face_name(tensor.name)
        if name not in shapes:
            continue
        try:
            values = file.read(tensor)
        except NotImplementedError as error:
            raise unsupported_weights(source, tensor.type) from error
        _check_shape(source, name, tuple(values.shape), shapes[name])
        module = tensor.name.split(".")[-2]
        if file.architecture == "llama" and module in heads:
            values = undo_permutation(values, heads[module])
        values = values[part(name)]
        yield name, torch.from_numpy(values.copy() if not values.flags.writeable else values)


def _at_random(_source: ModelSource, shapes: _Shapes, device: torch.device, part: Part) -> _Tensors:
    for name, shape in shapes.items():
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        if len(shape) == 1:
            yield name, torch.full(shape, float(name.endswith("weight")), device=device)[part(name)]
        else:
            drawn = torch.empty(shape, device=device).normal_(0.0, 0.02, generator=generator)
            at = part(name)
            yield name, drawn if at == _ALL else drawn[at].clone()  # not a view, which would keep all of it


def _corrupt(source: ModelSource, reason: str) -> LlmError:
    return LlmError("LLM_MODEL_CORRUPT", model=source.name, reason=reason)
