"""The pandas UDF that gives each row its place in prompt order, and the partition of its range (ReorderRows)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from spark_llm.optimizer.reorder.hashing import hash_values
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.optimizer.reorder.ranges import range_of, slots


def make_place_udf(table: bytes, cuts: bytes, count: int) -> Any:
    """(fields ...) STRING -> BINARY: four bytes that the exchange hashes, then eight for each leading cell.

    table: an encoded OrderTable. cuts: between ranges of rows (``choose_cuts``). count: of partitions, one a range; 0:
    rows stay in theirs. Rows sorted by the result have equal leading cells together.
    """
    from pyspark.sql.functions import pandas_udf

    def llm_place(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        known, words = OrderTable.decode(table), slots(max(1, count))
        for batch in batches:
            columns = batch if isinstance(batch, tuple) else (batch,)
            yield place(columns, known, cuts, words)

    llm_place.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
    return pandas_udf(llm_place, "binary")


def place(columns: tuple[pd.Series, ...], table: OrderTable, cuts: bytes, words: np.ndarray) -> pd.Series:
    """The places of a batch of rows as bytes. words: what the exchange sends to each range's partition."""
    hashes = [hash_values(pa.array(column, pa.utf8(), from_pandas=True)) for column in columns]
    key = table.place(np.stack(hashes, axis=1)).key
    slot = words[range_of(key, cuts)].astype("<u4").reshape(-1, 1)
    rows = np.concatenate([slot.view(np.uint8), np.ascontiguousarray(key.astype(">u8")).view(np.uint8)], axis=1)
    data, width = rows.tobytes(), rows.shape[1]
    return pd.Series([data[start : start + width] for start in range(0, len(data), width)], dtype=object)
