"""Encodes prompts as whole strings, for tokenizers of which no exact cut is known.

Slower than segments.py, since nothing but equal rows is shared. A message that spells a special token is
encoded apart from the template, so that it cannot forge one; all others give the ids of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from spark_llm.engine.request import TokenIds
from spark_llm.engine.text.batch import Ints, SegmentBatch
from spark_llm.engine.text.pieces import PieceEncoder
from spark_llm.engine.text.template import ChatFrame


class WholeEncoder:
    """Encodes batches of segments a row at a time. Takes a copy of ``tokenizer``."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        recognising, ignoring = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
        ignoring.encode_special_tokens = True
        self._template = PieceEncoder(recognising, cache_bytes // 2)
        self._text = PieceEncoder(ignoring, cache_bytes // 2)
        added = tokenizer.get_added_tokens_decoder().values()
        names = [re.escape(token.content) for token in added if token.special]
        self._find_special = re.compile("|".join(names) if names else r"(?!)")

    def encode(
        self, frame: ChatFrame, batch: SegmentBatch, leading: Sequence[int]
    ) -> tuple[list[TokenIds], list[Ints]]:
        """Each row's prompt in ids, and how many of them are template prefix and ``leading[i]`` leading segments."""
        batch = batch.message(frame.strips_start, frame.strips_end)
        rows = [batch.row(index) for index in range(len(batch.offsets) - 1)]
        messages = ["".join(row) for row in rows]
        encoded = self._encode(frame, messages, frame.suffix)
        counts = []
        for segments in leading:
            starts = self._encode(frame, ["".join(row[:segments]) for row in rows], "")
            lengths = [min(len(start), len(ids)) for start, ids in zip(starts, encoded, strict=True)]
            counts.append(np.array(lengths, np.int64))
        return encoded, counts

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> TokenIds:
        """A prompt in ids, of pieces that are the template's (False) or a user's."""
        if not any(is_own and self._find_special.search(text) for text, is_own in pieces):
            return self._template.encode(["".join(text for text, _ in pieces)])[0]
        encoders = {True: self._text, False: self._template}
        return np.concatenate([ids for text, is_own in pieces for ids in encoders[is_own].encode([text])])

    def _encode(self, frame: ChatFrame, messages: list[str], suffix: str) -> list[TokenIds]:
        known: dict[str, TokenIds] = {}
        distinct = dict.fromkeys(messages)
        apart = [text for text in distinct if frame.plain or self._find_special.search(text)]
        taken = set(apart)
        together = [text for text in distinct if text not in taken]
        strings = [f"{frame.prefix}{text}{suffix}" for text in together]
        known.update(zip(together, self._template.encode(strings), strict=True))
        if apart:
            before, after = self._template.encode([frame.prefix]), self._template.encode([suffix])
            for text, ids in zip(apart, self._text.encode(apart), strict=True):
                known[text] = np.concatenate([*before, ids, *after])
        return [known[text] for text in messages]
