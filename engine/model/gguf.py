"""Reads a GGUF file: its metadata, and its tensors dequantised under Hugging Face names.

The header is parsed here because the ``gguf`` package's reader takes seconds for a vocabulary; its
dequantisation is used as it is. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from spark_llm.errors import LlmError

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: shape in Hugging Face's order (rows first), offset in bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """The header of a GGUF file. tensors maps GGUF names (``blk.0.attn_q.weight``)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata entry ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def read(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """The tensor dequantised to float32, in its shape."""
        raw = np.memmap(self.path, np.uint8, "r", offset=tensor.offset, shape=(tensor.num_bytes,))
        rows = math.prod(tensor.shape[:-1])
        if tensor.type is gguf.GGMLQuantizationType.F32:
            values = raw.view(np.float32)
        else:
            values = gguf.quants.dequantize(raw.reshape(rows, -1), tensor.type)
        return np.asarray(values, np.float32).reshape(tensor.shape)


def open_gguf(path: Path) -> GgufFile:
    """The parsed header of ``path``, remembered while the file does not change. Raises LLM_MODEL_CORRUPT."""
    try:
        state = path.stat()
        return _open(path, state.st_size, state.st_mtime_ns)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise _corrupt(path, "its header is cut off or damaged") from error
    except OSError as error:
        raise _corrupt(path, str(error)) from error


@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, _mtime: int) -> GgufFile:
    with path.open("rb") as file:
        cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
        magic, version, tensor_count, kv_count = cursor.scalars("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise _corrupt(path, "it is not a little-endian GGUF file of version 2 or 3")
        metadata: dict[str, Any] = {}
        for _ in range(kv_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        headers = []
        for _ in range(tensor_count):
            name = cursor.string()
            dims = cursor.scalars(f"{cursor.scalar('I')}Q")
            headers.append((name, dims, *cursor.scalars("IQ")))
        alignment = int(metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
        start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(path, size, start, name, *rest) for name, *rest in headers}
    return GgufFile(path, metadata, tensors)


def _tensor(
    path: Path, size: int, start: int, name: str, dims: tuple[int, ...], type_id: int, offset: int
) -> GgufTensor:
    try:
        quantisation = gguf.GGMLQuantizationType(type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError) as error:
        raise _corrupt(path, f"tensor {name} has the unknown type {type_id}") from error
    if not dims or dims[0] % block:
        raise _corrupt(path, f"tensor {name} of type {quantisation.name} has the impossible shape {dims}")
    num_bytes = math.prod(dims) // block * block_bytes
    if start + offset + num_bytes > size:
        raise _corrupt(path, f"the file ends at byte {size}, inside tensor {name}")
    return GgufTensor(name, tuple(reversed(dims)), quantisation, start + offset, num_bytes)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self.position = 0

    def scalars(self, fields: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + fields)
        values = layout.unpack_from(self._data, self.position)
        self.position += layout.size
        return values

    def scalar(self, field: str) -> Any:
        return self.scalars(field)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        end = self.position + length
        if end > len(self._data):
            raise IndexError(end)
        text = self._data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalars("IQ")
            if item in _SCALARS:
                return list(self.scalars(f"{count}{_SCALARS[item]}"))
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise IndexError(kind)
        value = self.scalar(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value


def hugging_face_name(name: str) -> str | None:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; None for an unknown name."""
    if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = found.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}" if part in _LAYER_NAMES else None
    part, _, kind = name.rpartition(".")
    return f"{_GLOBAL_NAMES[part]}.{kind}" if part in _GLOBAL_NAMES else None


def undo_permutation(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """q or k weight (or bias) of a ``llama`` GGUF, in Hugging Face's order.

    llama.cpp rotates neighbouring pairs and so stores each head's rows interleaved
    (convert_hf_to_gguf.py, LlamaModel.permute); Hugging Face rotates halves.
    """
    half = values.shape[0] // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _corrupt(path: Path, reason: str) -> LlmError:
    return LlmError("LLM_MODEL_CORRUPT", model=path, reason=reason)
