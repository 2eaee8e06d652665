"""A row's text to ids as the model's tokenizer has them, special tokens included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from spark_llm.engine.encoder.config import Head
from spark_llm.engine.encoder.vectors import VectorText
from spark_llm.engine.request import TokenIds
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.batch import Ints, messages

_SLICE = 1 << 18  # characters that are tokenised at a time: the tokenizer takes some 300 bytes for each
_MARGIN = 1024  # characters before the end of a part of a text, within which tokens may not be those of the whole
_PER_TOKEN = 8  # characters of a text's first part for each token of the window: few texts have more
_MORE = 4  # times as much is taken of a text whose first part does not fill the window


class EncoderText(VectorText):
    """The tokenizer of a model that embeds. Safe to call from several threads.

    Unlike prompts, texts may spell special tokens, as they may in the libraries that models are trained with: there is
    no template to forge. window: what texts that may be cut are cut to, in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, window: int, head: Head) -> None:
        super().__init__(name)
        self.window = window
        self._head = head
        self._whole, self._cut = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
        self._cut.enable_truncation(window)
        self._special = self._whole.num_special_tokens_to_add(False)
        self._first = _PER_TOKEN * window + _MARGIN

    def encode_texts(self, texts: Sequence[str], truncate: bool = False) -> list[TokenIds]:
        """int32 [tokens] of each text. truncate: the ends of those that are too long are cut.

        Without it a long text that is too long may come with fewer tokens than it has, but more than the window: the
        rest of it is not looked at, whatever it is.
        """
        found: list[TokenIds] = []
        for some in _slices(texts, self._first):
            given = [self._given(text) for text in some]
            short = [text for text in given if len(text) <= self._first]
            tokenizer = self._cut if truncate else self._whole
            encodings = iter(tokenizer.encode_batch_fast(short))
            for text in given:
                if len(text) > self._first:
                    found.append(self._encode_long(text, truncate))
                else:
                    found.append(np.array(next(encodings).ids, np.int32))
        return found

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]:
        """As TextPipeline.encode_rows; nothing is shared between texts: both counts are 0.

        Raises LLM_MODEL_TASK_MISMATCH for a system message.
        """
        self.check(header)
        prompts = self.encode_texts(messages(batch.column("segments")), header.truncate)
        return prompts, np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.int64)

    def _given(self, text: str) -> str:
        given = self._head.prompt + text
        return given.lower() if self._head.lowercase else given

    def _encode_long(self, text: str, truncate: bool) -> TokenIds:
        """As much of a text as fills the window: words, and with them tokens, are found from near by."""
        size = self._first
        while size < len(text):
            part = self._whole.encode(text[:size], add_special_tokens=False)
            sure = sum(end <= size - _MARGIN for _, end in part.offsets)
            if (least := sure + self._special) > self.window:
                ids = (self._cut if truncate else self._whole).post_process(part).ids
                return np.array(ids[:least], np.int32)
            size *= _MORE
        return np.array((self._cut if truncate else self._whole).encode(text).ids, np.int32)


def _slices(texts: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """The texts in their order, ``_SLICE`` characters at a time or one text. most: characters that count of a text."""
    start = size = 0
    for end, text in enumerate(texts):
        size += min(len(text), most)
        if size > _SLICE and end > start:
            yield texts[start:end]
            start, size = end, min(len(text), most)
    if texts:
        yield texts[start:]
