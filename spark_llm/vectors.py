"""The UDF of embeddings: what an engine gives as the JSON text of numbers is an ARRAY<FLOAT> for Spark.

A vector is a third of its text on the way to the JVM, and no join, sort or exchange above the call has to carry the
text, or read it again for each pair of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

VECTOR_DDL = "ARRAY<FLOAT>"

_DECODER = msgspec.json.Decoder(list[float])  # many times faster than Python's own on hundreds of numbers


def numbers(text: str) -> list[float]:
    """The numbers of a JSON array. msgspec.MsgspecError where the text is none of finite numbers."""
    return _DECODER.decode(text)


def vectors(texts: Sequence[str | None]) -> pd.Series:
    """The vectors of JSON arrays, float32 [width] each; None for None."""
    found = np.empty(len(texts), np.object_)
    for row, text in enumerate(texts):  # one by one: an assignment of all would be one of a matrix
        found[row] = None if text is None else np.array(numbers(text), np.float32)
    return pd.Series(found)


def vector_udf(text_udf: Any) -> Any:
    """The pandas UDF of the vectors that ``text_udf``, that of one call, gives as texts."""
    from pyspark.sql.functions import pandas_udf

    answer = text_udf.func

    def llm(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        for texts in answer(batches):
            yield vectors(texts.tolist())

    # The hints must be objects for Spark to see what kind of UDF this is; here they would be text.
    llm.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
    return pandas_udf(llm, VECTOR_DDL)
