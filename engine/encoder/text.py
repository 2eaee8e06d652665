"""The text side of embeddings: a row's text to ids as the model's tokenizer has them, special tokens included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from spark_llm.engine.request import Constraint, TokenIds
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.batch import Ints, messages
from spark_llm.errors import LlmError


class EncoderText:
    """The tokenizer of an encoder. Safe to call from several threads.

    Unlike prompts, texts may spell special tokens, as they may in the libraries that models are trained with: there is
    no template to forge. window: what texts that may be cut are cut to, in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, window: int, lowercase: bool) -> None:
        self.name = name
        self._lowercase = lowercase
        self._whole, self._cut = (Tokenizer.from_str(tokenizer.to_str()) for _ in range(2))
        for each in (self._whole, self._cut):
            each.no_padding()
            each.no_truncation()
        self._cut.enable_truncation(window)
        self.window = window

    def encode_texts(self, texts: Sequence[str], truncate: bool = False) -> list[TokenIds]:
        """int32 [tokens] of each text. truncate: the ends of those that are too long are cut."""
        given = [text.lower() for text in texts] if self._lowercase else list(texts)
        tokenizer = self._cut if truncate else self._whole
        return [np.array(found.ids, np.int32) for found in tokenizer.encode_batch(given)]

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]:
        """As TextPipeline.encode_rows; nothing is shared between texts: both counts are 0.

        Raises LLM_MODEL_TASK_MISMATCH for a system message.
        """
        if header.system is not None:
            self._refuse("follow a system message")
        prompts = self.encode_texts(messages(batch.column("segments")), header.truncate)
        return prompts, np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.int64)

    def decode(self, outputs: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> list[str]:
        """Nothing: vectors come as texts already."""
        return ["" for _ in outputs]

    def stop_checker(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """None: there is nothing to stop."""
        return None

    def constrain(self, system: str | None, constraint: Constraint) -> NoReturn:
        """Raises LLM_MODEL_TASK_MISMATCH."""
        self._refuse("keep its answers to a constraint")

    def _refuse(self, task: str) -> NoReturn:
        reason, remedy = "it makes vectors of texts", "Leave that out, or ask a model that generates"
        raise LlmError("LLM_MODEL_TASK_MISMATCH", model=self.name, task=task, reason=reason, remedy=remedy)
