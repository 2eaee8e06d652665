"""The files of the result cache: immutable Arrow IPC segments of answers, written aside and renamed at commit.

A segment holds the answers of one engine and a few seconds. Its name tells when the oldest of them was given, so that a
listing is enough to find what is new, what is older than the last clearing, and what goes first when there is too much.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

DIGEST_BYTES = 16
TEMPORARY = ".writing-"
_CHOICE_BYTES = 200  # of a choice in memory, beside its text
_NAME = re.compile(r"(\d{13,})-[0-9a-f]{16}\.arrow")
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("finish_reason", pa.utf8(), nullable=False),
        pa.field("output", pa.list_(pa.field("token", pa.int32(), nullable=False)), nullable=False),
        pa.field("text", pa.utf8()),
        pa.field("confidence", pa.float64()),
    ]
)
_OLD_SCHEMA = pa.schema([_SCHEMA.field(column) for column in range(3)])  # before answers had choices


class BadSegment(Exception):
    """The file is no whole segment: half-written, damaged, or of another version."""


class StoredAnswer(NamedTuple):
    """An answer as it is kept. output: its token ids, int32 little-endian. at: when it was given, seconds since 1970.

    Token ids and not text: what makes text of them (the stop strings, the tokenizer) is part of the key and of the
    model's fingerprint, and a stored answer then takes the way of any other. text, confidence: see Completion.
    """

    output: bytes
    finish_reason: str
    at: float
    text: str | None = None
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """The answers of a segment in memory. offsets: int64 [rows + 1] into ``tokens``, int32.

    choices: row -> text and confidence, of those that have them.
    """

    keys: bytes
    reasons: list[str]
    offsets: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    choices: dict[int, tuple[str | None, float | None]]

    @property
    def num_bytes(self) -> int:
        choices = sum(_CHOICE_BYTES + len(text or "") for text, _ in self.choices.values())
        return len(self.keys) + 8 * len(self.reasons) + self.offsets.nbytes + self.tokens.nbytes + choices

    def key(self, row: int) -> bytes:
        return self.keys[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]

    def answer(self, row: int, at: float) -> StoredAnswer:
        tokens = self.tokens[self.offsets[row] : self.offsets[row + 1]]
        return StoredAnswer(tokens.tobytes(), self.reasons[row], at, *self.choices.get(row, (None, None)))


def given_at(name: str) -> float | None:
    """When the oldest answer of the segment ``name`` was given, in seconds since 1970; None: it names no segment."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1]) / 1000


def write(files: pafs.FileSystem, folder: str, answers: Sequence[tuple[bytes, StoredAnswer]]) -> tuple[str, int]:
    """Writes a segment of ``answers`` (digest, answer) and commits it; its name and bytes.

    Raises OSError and ArrowException. The rename is as atomic as the file system's; an object store shows an object
    only when it is whole.
    """
    keys = b"".join(key for key, _ in answers)
    tokens = np.frombuffer(b"".join(answer.output for _, answer in answers), np.int32)
    lengths = [len(answer.output) // 4 for _, answer in answers]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    reasons = [answer.finish_reason for _, answer in answers]
    texts = [answer.text for _, answer in answers]
    confidences = [answer.confidence for _, answer in answers]
    choices = {row: pair for row, pair in enumerate(zip(texts, confidences, strict=True)) if pair != (None, None)}
    marks = {"keys": _mark(keys), "answers": _answers_mark(reasons, offsets, tokens, choices)}
    columns = [
        pa.Array.from_buffers(pa.binary(DIGEST_BYTES), len(answers), [None, pa.py_buffer(keys)]),
        pa.array(reasons, pa.utf8()),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens)).cast(_SCHEMA.field("output").type),
        pa.array(texts, pa.utf8()),
        pa.array(confidences, pa.float64()),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=_SCHEMA.with_metadata(marks))
    unique = os.urandom(8).hex()
    name = f"{int(min(answer.at for _, answer in answers) * 1000):013d}-{unique}.arrow"
    aside = f"{folder}/{TEMPORARY}{unique}"
    with files.open_output_stream(aside) as sink:
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        size = sink.tell()
    files.move(aside, f"{folder}/{name}")
    return name, size


def read_keys(files: pafs.FileSystem, path: str) -> bytes:
    """The digests of a segment's answers, one after the other. Raises BadSegment, FileNotFoundError."""
    table = _read(files, path, columns=[0])
    keys = _key_bytes(table.column(0))
    _check(table.schema, "keys", _mark(keys), path)
    return keys


def read(files: pafs.FileSystem, path: str) -> Segment:
    """A whole segment. Raises BadSegment, FileNotFoundError."""
    table = _read(files, path, columns=None)
    output = pa.chunked_array(table.column(2)).combine_chunks()
    output = output.chunk(0) if isinstance(output, pa.ChunkedArray) else output
    offsets = output.offsets.to_numpy().astype(np.int64)
    segment = Segment(
        _key_bytes(table.column(0)),
        table.column(1).to_pylist(),
        offsets,
        output.values.to_numpy().astype(np.int32),
        _choices(table),
    )
    _check(table.schema, "keys", _mark(segment.keys), path)
    _check(table.schema, "answers", _answers_mark(segment.reasons, offsets, segment.tokens, segment.choices), path)
    return segment


def _choices(table: pa.Table) -> dict[int, tuple[str | None, float | None]]:
    if table.num_columns == len(_OLD_SCHEMA):
        return {}
    pairs = zip(table.column(3).to_pylist(), table.column(4).to_pylist(), strict=True)
    return {row: pair for row, pair in enumerate(pairs) if pair != (None, None)}


def _read(files: pafs.FileSystem, path: str, columns: list[int] | None) -> pa.Table:
    try:
        with files.open_input_file(path) as source:
            table = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=columns)).read_all()
        expected = [_SCHEMA, _OLD_SCHEMA]
        if columns is not None:
            expected = [pa.schema([_SCHEMA.field(column) for column in columns])]
        if not any(table.schema.equals(schema) for schema in expected):
            raise BadSegment(f"{path}: not a segment of this version")
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadSegment(f"{path}: {error}") from error
    return table


def _key_bytes(column: pa.ChunkedArray) -> bytes:
    return b"".join(column.to_pylist())


def _answers_mark(
    reasons: list[str],
    offsets: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
    choices: dict[int, tuple[str | None, float | None]],
) -> str:
    told = [repr(choices).encode()] if choices else []  # without, the mark is as it was before there were choices
    return _mark("\n".join(reasons).encode(), offsets.tobytes(), tokens.tobytes(), *told)


def _mark(*parts: bytes) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return str(digest.hexdigest())


def _check(schema: pa.Schema, name: str, mark: str, path: str) -> None:
    if (schema.metadata or {}).get(name.encode()) != mark.encode():
        raise BadSegment(f"{path}: its {name} are damaged")
