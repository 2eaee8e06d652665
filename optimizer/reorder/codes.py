"""A table as numbers: a pandas DataFrame or a pyarrow Table of any column types, dictionary-encoded. NULL is a value.

Two cells of a field are equal if both are NULL or if their texts are equal. pandas is never imported here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_llm.errors import LlmError
from spark_llm.optimizer.reorder.measure import Lengths, Render, measure_texts, own_text

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class CodedTable(NamedTuple):
    """``cells``: int64 [rows, fields], the number of each cell: equal where cells of a field are, never the same in two
    fields. ``lengths``: float64 [cell numbers]. ``shown``: object [value numbers], each value as ``(field, value)``;
    ``values``: int64 [rows, fields], the value of each cell (several values may have one text, hence be one cell)."""

    cells: Ints
    lengths: Floats
    shown: npt.NDArray[np.object_]
    values: Ints


class _Column(NamedTuple):
    """``codes``: int64 [rows], each row's value by its place in ``distinct``, python values. ``reads_apart``: no two of
    them have the same text of their own."""

    codes: Ints
    distinct: list[Any]
    reads_apart: bool


def encode(table: Any, lengths: Lengths | None = None, render: Render | None = None) -> CodedTable:
    """Encode a table. Raises [LLM_INVALID_TABLE] where it is neither a pandas DataFrame nor a pyarrow Table, or where
    ``lengths`` or ``render`` give what they must not."""
    if isinstance(table, pa.Table | pa.RecordBatch):
        names: list[Any] = table.schema.names
        columns = [_arrow_column(table.column(i)) for i in range(table.num_columns)]
        rows = table.num_rows
    elif hasattr(table, "iloc") and hasattr(table, "columns"):
        names = list(table.columns)
        columns = [_pandas_column(table.iloc[:, i]) for i in range(len(names))]
        rows = len(table)
    else:
        raise _invalid(f"a pandas DataFrame or a pyarrow Table is expected, not {type(table).__name__}")
    return _number(names, columns, rows, lengths, render)


def _invalid(reason: str) -> LlmError:
    return LlmError("LLM_INVALID_TABLE", reason=reason)


def _number(
    names: list[Any], columns: list[_Column], rows: int, lengths: Lengths | None, render: Render | None
) -> CodedTable:
    """Give numbers to the values and to the cells of all columns, and measure each cell once."""
    cells = np.empty((rows, len(columns)), np.int64, order="F")
    values = np.empty((rows, len(columns)), np.int64, order="F")
    texts: list[str] = []
    shown: list[tuple[Any, Any]] = []
    for number, (name, column) in enumerate(zip(names, columns, strict=True)):
        start = len(texts)
        if column.reads_apart and render is None:
            texts.extend([own_text(name, value) for value in column.distinct])
            cells[:, number] = column.codes + start
        else:
            cell_of: dict[tuple[bool, str], int] = {}
            keys = [(value is None, _text(name, value, render)) for value in column.distinct]
            code = np.array([cell_of.setdefault(key, len(cell_of)) for key in keys], np.int64)
            texts.extend(text for _, text in cell_of)
            cells[:, number] = start + code[column.codes]
        values[:, number] = column.codes + len(shown)
        shown.extend([(name, value) for value in column.distinct])
    try:
        length = measure_texts(texts, lengths)
    except ValueError as error:
        raise _invalid(str(error)) from error
    boxed = np.empty(len(shown), np.object_)
    boxed[:] = shown
    return CodedTable(cells, length, boxed, values)


def _text(name: Any, value: Any, render: Render | None) -> str:
    text = own_text(name, value) if render is None else render(name, value)
    if not isinstance(text, str):
        raise _invalid(f"render gave {type(text).__name__} for a value of field {name}, not str")
    return text


def _arrow_column(column: Any) -> _Column:
    column = _whole(column)
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    try:
        encoded = column.dictionary_encode()
    except pa.ArrowNotImplementedError:
        return _by_text(column.to_pylist())
    return _with_null(_codes(encoded), encoded.dictionary.to_pylist(), reads_apart=True)


def _whole(column: Any) -> Any:
    """The chunks of a column as one array."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_string(column.type) or pa.types.is_binary(column.type):  # may be more than one such array can hold
        column = column.cast(pa.large_string() if pa.types.is_string(column.type) else pa.large_binary())
    return column.combine_chunks()


def _codes(encoded: Any) -> Ints:
    """The indices of a dictionary array, -1 for NULL."""
    codes: Ints = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return codes


def _with_null(codes: Ints, distinct: list[Any], reads_apart: bool) -> _Column:
    missing = codes < 0
    if missing.any():
        codes = np.where(missing, len(distinct), codes)
        distinct = [*distinct, None]
    return _Column(codes, distinct, reads_apart)


def _pandas_column(series: Any) -> _Column:
    """NaN, NaT and NA are NULL, as everywhere in pandas."""
    if str(series.dtype) == "category":
        return _with_null(series.cat.codes.to_numpy(np.int64), series.cat.categories.tolist(), reads_apart=False)
    try:
        array = _whole(pa.array(series, from_pandas=True))
        is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        # Of mixed objects Arrow makes one type; only texts are sure to be what they were.
        if series.dtype == object and not is_text:
            return _by_text(_none_for_missing(series))
        encoded = array.dictionary_encode()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return _by_text(_none_for_missing(series))
    codes = _codes(encoded)
    if is_text:
        return _with_null(codes, encoded.dictionary.to_pylist(), reads_apart=True)
    first = np.zeros(int(codes.max(initial=-1)) + 1, np.int64)
    present = np.flatnonzero(codes >= 0)[::-1]
    first[codes[present]] = present  # the earliest row of each value is written last
    return _with_null(codes, series.iloc[first].tolist(), reads_apart=True)


def _none_for_missing(series: Any) -> list[Any]:
    return [None if missing else value for value, missing in zip(series.tolist(), series.isna().tolist(), strict=True)]


def _by_text(values: list[Any]) -> _Column:
    """Of values that may not hash, or that are equal though they read differently (1 and True): each its own."""
    return _Column(np.arange(len(values)), values, reads_apart=False)
