"""Names a model by its contents, so that engines on any host know each other's answers, at the cost of a few reads."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from spark_llm.engine.model.gguf import open_gguf
from spark_llm.engine.model.source import ModelSource, packaged_path

_VERSION = b"1"  # to be raised when the engine's answers to a prompt change
_SAMPLE_BYTES = 4096  # of each tensor, from its middle
_HEADER_LIMIT = 100 << 20  # bytes; safetensors allows no longer header


def fingerprint(source: ModelSource, dtype: str) -> str:
    """32 hex digits that are equal for equal models, wherever they lie and whatever they are called.

    Of the configuration, tokenizer and chat template every byte counts; of the weights names, types, shapes and places
    of all tensors, and 4 KiB from the middle of each: training changes a tensor as a whole. dtype: of the weights in
    memory. A chat template that tells the date counts as what it says, not as what it makes of today. Raises OSError.
    """
    digest = hashlib.blake2b(_VERSION + dtype.encode(), digest_size=16)
    for part in _parts(source):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def _parts(source: ModelSource) -> Iterator[bytes]:
    yield source.kind.encode()
    if source.kind == "gguf":
        yield from _gguf(source.path)
        return
    folder = source.path.parent if source.kind == "dummy" else source.path
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        yield path.name.encode()
        yield path.read_bytes()
    if source.kind == "folder":
        for path in sorted(folder.glob("*.safetensors")):
            yield path.name.encode()
            yield from _safetensors(path)
    elif not (folder / "tokenizer.json").is_file() and (packaged := packaged_path()) is not None:
        yield from _gguf(packaged)  # whose tokenizer it borrows


def _gguf(path: Path) -> Iterator[bytes]:
    tensors = open_gguf(path).tensors.values()
    start = min((tensor.offset for tensor in tensors), default=path.stat().st_size)
    yield str(path.stat().st_size).encode()
    with path.open("rb") as file:
        yield file.read(start)  # metadata, tokenizer and template among it, and the table of tensors
        for tensor in tensors:
            yield _middle(file.fileno(), tensor.offset, tensor.num_bytes)


def _safetensors(path: Path) -> Iterator[bytes]:
    """Format: https://huggingface.co/docs/safetensors (8 bytes of header length, header in JSON, tensors)."""
    yield str(path.stat().st_size).encode()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _HEADER_LIMIT))
        yield header
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield _middle(file.fileno(), 8 + length + begin, end - begin)


def _middle(file: int, offset: int, num_bytes: int) -> bytes:
    size = min(num_bytes, _SAMPLE_BYTES)
    return os.pread(file, size, offset + (num_bytes - size) // 2)
