"""Encodes distinct texts once: one Rust batch for what is new, a cache bounded in bytes for what repeats."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from spark_llm.engine.request import TokenIds

_OVERHEAD = 300  # bytes that an entry costs beside its text and its ids


class PieceEncoder:
    """Text -> int32 ids by one tokenizer, without adding tokens. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._limit = cache_bytes
        self._bytes = 0
        self._cache: OrderedDict[str, TokenIds] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> list[TokenIds]:
        """The ids of each of ``texts``, which should be distinct. Callers must not write into them."""
        with self._lock:
            found = [self._cache.get(text) for text in texts]
            for text, ids in zip(texts, found, strict=True):
                if ids is not None:
                    self._cache.move_to_end(text)
        missing = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        if missing:
            encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
            new = [np.array(encoding.ids, np.int32) for encoding in encodings]
            self._remember(missing, new)
            fresh = iter(new)
            return [next(fresh) if ids is None else ids for ids in found]
        return [ids for ids in found if ids is not None]

    @property
    def cached_bytes(self) -> int:
        """Bytes that the cache holds now."""
        return self._bytes

    def _remember(self, texts: Sequence[str], new: Sequence[TokenIds]) -> None:
        with self._lock:
            for text, ids in zip(texts, new, strict=True):
                if text not in self._cache:
                    self._cache[text] = ids
                    self._bytes += _size(text, ids)
            while self._bytes > self._limit:
                self._bytes -= _size(*self._cache.popitem(last=False))


def _size(text: str, ids: TokenIds) -> int:
    return 2 * len(text) + ids.nbytes + _OVERHEAD
