"""A row's text to ids as the model's tokenizer has them, special tokens included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from spark_llm.engine.encoder.config import Head
from spark_llm.engine.encoder.vectors import VectorText
from spark_llm.engine.request import TokenIds
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.batch import Ints, messages


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

    def encode_texts(self, texts: Sequence[str], truncate: bool = False) -> list[TokenIds]:
        """int32 [tokens] of each text. truncate: the ends of those that are too long are cut."""
        given = [self._head.prompt + text for text in texts]
        if self._head.lowercase:
            given = [text.lower() for text in given]
        tokenizer = self._cut if truncate else self._whole
        return [np.array(found.ids, np.int32) for found in tokenizer.encode_batch(given)]

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]:
        """As TextPipeline.encode_rows; nothing is shared between texts: both counts are 0.

        Raises LLM_MODEL_TASK_MISMATCH for a system message.
        """
        self.check(header)
        prompts = self.encode_texts(messages(batch.column("segments")), header.truncate)
        return prompts, np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.int64)
