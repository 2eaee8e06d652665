"""Hashes of field values, equal to those that Spark SQL computes: a table made on one side reads on the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

Hashes = npt.NDArray[np.uint64]

# Spark's xxhash64 starts from this seed, and leaves it as it is where the value is NULL.
SEED = 42


def hash_values(array: pa.Array | pa.ChunkedArray) -> Hashes:
    """The 64-bit hash of each value of a string array (plain, large, view or dictionary): uint64 [rows].

    It is xxHash64 with seed 42 of the UTF-8 bytes, and 42 for NULL: what ``xxhash64(col)`` of Spark SQL gives for
    a STRING column, read as unsigned. Distinct values are hashed once.
    """
    if isinstance(array, pa.ChunkedArray):
        if array.num_chunks == 0:
            return np.empty(0, np.uint64)
        array = array.combine_chunks()
    if not isinstance(array, pa.DictionaryArray):
        array = array.dictionary_encode()
    digest, seed = xxhash.xxh64_intdigest, SEED
    texts = array.dictionary.cast(pa.large_binary()).to_pylist()
    # A dictionary may hold NULL as a value, too; and one more slot stands for the rows that have no index.
    values = np.fromiter((seed if t is None else digest(t, seed) for t in [*texts, None]), np.uint64, len(texts) + 1)
    codes: npt.NDArray[np.int64] = array.indices.cast(pa.int64()).fill_null(len(texts)).to_numpy(zero_copy_only=False)
    hashes: Hashes = values[codes]
    return hashes
