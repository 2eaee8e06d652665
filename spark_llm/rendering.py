"""The text that a row's arguments become: a pure function of prompt, fields and layout, rendered a window at a time.

A user message is a list of segments: the prompt, then one line ``name: <JSON value>`` for each field, in the order
that the layout says, or the fields first and then the prompt. Every segment before the last ends in one newline
after a character that is no space, and the next begins with a character that is no space: there most tokenizers
can be cut without changing a token (CONTRACTS.md 14). Each distinct value is rendered once; rows are numbers into
one sorted dictionary of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_llm.call import FieldSpec
from spark_llm.engine.service.protocol import request_rows
from spark_llm.field_text import FieldRenderer, instruction_line, whole_text

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RenderedWindow:
    """The messages of a window of rows.

    dictionary: the distinct segments in code point order, so that codes compare as the texts do.
    codes: int64 [rows, 1 + fields], numbers into ``dictionary``.
    """

    dictionary: pa.StringArray
    codes: Ints

    def texts(self, row: int) -> list[str]:
        """The segments of one row."""
        return [self.dictionary[int(code)].as_py() for code in self.codes[row]]


def asks(prompt: pa.Array, fields: Sequence[pa.Array]) -> npt.NDArray[np.bool_]:
    """bool [rows]: False where the answer is NULL without a call. A row asks nothing when its prompt is NULL, or when
    it has fields and all of them are NULL."""
    found = _valid(prompt)
    if fields:
        found &= np.logical_or.reduce([_valid(field) for field in fields])
    return found


def render(
    prompt: pa.Array,
    fields: Sequence[pa.Array],
    specs: Sequence[FieldSpec],
    orders: Ints | None = None,
    instruction_last: bool = False,
) -> RenderedWindow:
    """Render a window: ``prompt`` and each of ``fields`` are string arrays of one length, with NULLs.

    orders: int64 [rows, fields], for each row the numbers of its fields in the order of its lines; None: as given.
    instruction_last: the lines of the fields stand before the prompt.
    """
    rows = len(prompt)
    columns = [_factorize(prompt, instruction_line if fields else whole_text)]
    for field, spec in zip(fields, specs, strict=True):
        columns.append(_factorize(field, FieldRenderer(spec)))

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
    if orders is not None:
        codes[:, 1:] = np.take_along_axis(codes[:, 1:], orders, axis=1)
    if instruction_last:
        codes = np.roll(codes, -1, axis=1)
    return RenderedWindow(encoded.dictionary.take(pa.array(order)), codes)


def request_batch(
    window: RenderedWindow,
    rows: Ints,
    first_id: int,
    keys: Sequence[bytes] | None = None,
    seeds: Sequence[int] | None = None,
    choices: Sequence[Sequence[str] | None] | pa.Array | None = None,
) -> pa.RecordBatch:
    """The REQUEST_SCHEMA batch that asks ``rows`` of a window, in this order, with ids from ``first_id`` on.

    keys: of these rows, for requests that the engine may answer with the answer of an equal one. seeds: of these
    rows, for draws that repeat. choices: of these rows, what their answers may be.
    """
    codes = window.codes[rows]
    used, numbers = np.unique(codes, return_inverse=True)
    indices = pa.array(numbers.reshape(-1).astype(np.int32))
    segments = pa.DictionaryArray.from_arrays(indices, window.dictionary.take(pa.array(used)))
    offsets = pa.array(np.arange(0, codes.size + 1, codes.shape[1], dtype=np.int32))
    ids = pa.array(np.arange(first_id, first_id + len(rows), dtype=np.int64))
    return request_rows(ids, pa.ListArray.from_arrays(offsets, segments), seeds=seeds, keys=keys, choices=choices)


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    valid: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _factorize(array: pa.Array, render_value: Callable[[str | None], str]) -> tuple[Ints, list[str]]:
    """Each row's number into the rendered distinct values, where NULL is one value."""
    encoded = pc.dictionary_encode(array, null_encoding="encode")
    texts = [render_value(value) for value in encoded.dictionary.to_pylist()]
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), texts
