"""The pandas UDF that gives each row its place in prompt order, where an order table has groups (ReorderRows)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from spark_llm.optimizer.reorder.hashing import hash_values
from spark_llm.optimizer.reorder.order_table import OrderTable


def make_place_udf(table: bytes) -> Any:
    """(fields ...) STRING -> BINARY: eight bytes for the row's group or leading cell, then eight for each further cell.

    table: an encoded OrderTable. Rows sorted by the result have equal leading cells together.
    """
    from pyspark.sql.functions import pandas_udf

    def llm_place(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        known = OrderTable.decode(table)
        for batch in batches:
            columns = batch if isinstance(batch, tuple) else (batch,)
            yield place(columns, known)

    llm_place.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
    return pandas_udf(llm_place, "binary")


def place(columns: tuple[pd.Series, ...], table: OrderTable) -> pd.Series:
    """The places of a batch of rows as bytes."""
    hashes = [hash_values(pa.array(column, pa.utf8(), from_pandas=True)) for column in columns]
    placement = table.place(np.stack(hashes, axis=1))
    return pd.Series(placement.binary().to_pylist(), dtype=object)
