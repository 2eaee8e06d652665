"""Canonical arguments: when two rows of a call ask the same, found before anything is rendered (CONTRACTS.md 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

DIGEST_BYTES = 16
_NULL = bytes(DIGEST_BYTES)


def row_keys(columns: Sequence[pa.Array], call: bytes) -> list[bytes]:
    """For each row of the string arrays ``columns`` 16 bytes that are equal exactly for equal rows of equal calls.

    call: the constant part of the call (``CallSpec.canonical``). Distinct values are hashed once.
    """
    start = hashlib.blake2b(call, digest_size=DIGEST_BYTES).digest()
    digests = [_digests(column) for column in columns]
    rows = zip(*digests, strict=True)
    return [hashlib.blake2b(start + b"".join(row), digest_size=DIGEST_BYTES).digest() for row in rows]


def row_seed(seed: int, key: bytes) -> int:
    """The seed in [0, 2**63) of the row with this key, under the call's ``seed`` (CONTRACTS.md 3)."""
    return int(xxhash.xxh3_64_intdigest(b"%d:%b" % (seed, key)) >> 1)


def _digests(column: pa.Array) -> list[bytes]:
    """Each value's digest; NULL has one that no text has."""
    encoded = pc.dictionary_encode(column, null_encoding="encode")
    table = [
        _NULL if text is None else hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
        for text in encoded.dictionary.to_pylist()
    ]
    return [table[code] for code in encoded.indices.to_pylist()]
