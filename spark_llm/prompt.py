"""The text that a row's arguments become: a pure function of prompt and fields, rendered a window at a time.

A user message is a list of segments: the prompt, then one line ``name: <JSON value>`` for each field. Every
segment before the last ends in one newline after a character that is no space, and the next begins with a
character that is no space: there most tokenizers can be cut without changing a token (CONTRACTS.md 14).
Each distinct value is rendered once; rows are numbers into one sorted dictionary of segments.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from spark_llm.call import FieldSpec
from spark_llm.engine.service.protocol import REQUEST_SCHEMA

Ints = npt.NDArray[np.int64]

_WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True, slots=True)
class RenderedWindow:
    """The messages of a window of rows.

    dictionary: the distinct segments in code point order, so that codes compare as the texts do.
    codes: int64 [rows, 1 + fields], numbers into ``dictionary``.
    asks: bool [rows]; False where the answer is NULL without a call (then the row's codes mean nothing).
    """

    dictionary: pa.StringArray
    codes: Ints
    asks: npt.NDArray[np.bool_]

    def texts(self, row: int) -> list[str]:
        """The segments of one row."""
        return [self.dictionary[int(code)].as_py() for code in self.codes[row]]

    def keys(self, rows: Ints) -> list[bytes]:
        """For each of ``rows`` 16 bytes a segment that are equal exactly for equal rows, in any window."""
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in self.dictionary.to_pylist()]
        return [b"".join([digests[code] for code in row]) for row in self.codes[rows].tolist()]


def render(prompt: pa.Array, fields: Sequence[pa.Array], specs: Sequence[FieldSpec]) -> RenderedWindow:
    """Render a window: ``prompt`` and each of ``fields`` are string arrays of one length, with NULLs.

    A row asks nothing when its prompt is NULL, or when it has fields and all of them are NULL.
    """
    rows = len(prompt)
    asks = _valid(prompt)
    if fields:
        asks &= np.logical_or.reduce([_valid(field) for field in fields])

    columns = [_factorize(prompt, _instruction_line if fields else _whole)]
    for field, spec in zip(fields, specs, strict=True):
        columns.append(_factorize(field, _FieldRenderer(spec)))

    # Values of different columns, or NULL and a JSON "null", may give the same text: one dictionary for all.
    encoded = pc.dictionary_encode(pa.array([text for _, texts in columns for text in texts], pa.utf8()))
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    numbers = rank[encoded.indices.to_numpy()]
    codes = np.empty((rows, len(columns)), np.int64)
    start = 0
    for position, (values, texts) in enumerate(columns):
        codes[:, position] = numbers[start + values]
        start += len(texts)
    return RenderedWindow(encoded.dictionary.take(pa.array(order)), codes, asks)


def request_batch(window: RenderedWindow, rows: Ints, first_id: int, seed: int | None = None) -> pa.RecordBatch:
    """The REQUEST_SCHEMA batch that asks ``rows`` of a window, in this order, with ids from ``first_id`` on.

    With ``seed`` each row gets a seed of its own, made of ``seed`` and the row's segments.
    """
    codes = window.codes[rows]
    used, numbers = np.unique(codes, return_inverse=True)
    indices = pa.array(numbers.reshape(-1).astype(np.int32))
    segments = pa.DictionaryArray.from_arrays(indices, window.dictionary.take(pa.array(used)))
    offsets = pa.array(np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32))
    seeds = pa.nulls(len(rows), pa.int64())
    if seed is not None:
        seeds = pa.array([row_seed(seed, key) for key in window.keys(rows)], pa.int64())
    ids = pa.array(np.arange(first_id, first_id + len(rows), dtype=np.int64))
    columns = [ids, pa.ListArray.from_arrays(offsets, segments), seeds, pa.nulls(len(rows), pa.binary())]
    return pa.RecordBatch.from_arrays(columns, schema=REQUEST_SCHEMA)


def row_seed(seed: int, key: bytes) -> int:
    """The seed in [0, 2**63) of the row with this key, under the call's ``seed``."""
    return int(xxhash.xxh3_64_intdigest(b"%d:%b" % (seed, key)) >> 1)


class _FieldRenderer:
    """One field's values -> its lines."""

    def __init__(self, spec: FieldSpec) -> None:
        name = spec.name if _WORD.fullmatch(spec.name) else json.dumps(spec.name, ensure_ascii=False)
        self._start = f"{name}: "
        self._is_json = spec.json

    def __call__(self, value: str | None) -> str:
        if value is None:
            value = "null"
        elif not self._is_json:
            value = json.dumps(value, ensure_ascii=False)
        return f"{self._start}{value}\n"


def _whole(prompt: str | None) -> str:
    return prompt or ""


def _instruction_line(prompt: str | None) -> str:
    """The prompt as a segment before fields: whatever space ends it becomes one newline."""
    prompt = (prompt or "").rstrip()
    return f"{prompt}\n" if prompt else ""


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    valid: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _factorize(array: pa.Array, render_value: Callable[[str | None], str]) -> tuple[Ints, list[str]]:
    """Each row's number into the rendered distinct values, where NULL is one value."""
    encoded = pc.dictionary_encode(array, null_encoding="encode")
    texts = [render_value(value) for value in encoded.dictionary.to_pylist()]
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), texts
