"""The text side of a server that tokenises itself: what its rows are made of where the service counts in tokens.

An id stands for four bytes of UTF-8, about a token of English. So folding, budgets, fair turns and the result cache
work on these rows as on those of the built-in engine; what the server says that they cost is told in the reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pyarrow as pa

from spark_llm.engine.backend.form import AnswerFormat
from spark_llm.engine.config import Task
from spark_llm.engine.encoder.vectors import VectorText
from spark_llm.engine.request import Constraint, TokenIds
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.batch import Ints, messages

ID_BYTES = 4


def pack(text: bytes) -> TokenIds:
    """UTF-8 as int32 [ids], filled up with spaces, which mean nothing at the end of JSON and of an answer."""
    return np.frombuffer(text + b" " * (-len(text) % ID_BYTES), np.int32)


def unpack(ids: Sequence[int] | TokenIds) -> bytes:
    """The text of ``pack``, with the spaces."""
    return np.asarray(ids, np.int32).tobytes()


def fingerprint_of(url: str, model: str, task: Task) -> str:
    """Names a server's model for answers on disk: 32 hex digits. What the server changes behind its name, it cannot
    tell."""
    return hashlib.sha256("\0".join((url, model, task)).encode()).hexdigest()[:32]


class MessageText:
    """Prompts are the JSON array of a row's chat messages, packed; answers are texts, packed."""

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]:
        """As TextPipeline.encode_rows; which tokens rows share, only the server knows: both counts are 0."""
        # messages() leaves the very text that TextPipeline puts into a template
        system = [] if header.system is None else [{"role": "system", "content": header.system}]
        prompts = [
            pack(msgspec.json.encode([*system, {"role": "user", "content": text}]))
            for text in messages(batch.column("segments"))
        ]
        return prompts, np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.int64)

    def decode(self, outputs: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> list[str]:
        """The answers' texts without outer white space; the server has cut them at stop strings."""
        return [unpack(output).decode().strip() for output in outputs]

    def stop_checker(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
        """None: stop strings go to the server."""
        return None

    def constrain(self, system: str | None, constraint: Constraint) -> AnswerFormat:
        """The answer format to ask the server for. Raises LLM_INVALID_CONSTRAINT."""
        return AnswerFormat(constraint)


class PlainText(VectorText):
    """Prompts are a row's text as a JSON string, packed; answers are vectors."""

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]:
        """As MessageText.encode_rows. Only the server knows its tokens: texts are never cut.

        Raises LLM_MODEL_TASK_MISMATCH for a system message.
        """
        self.check(header)
        prompts = [pack(msgspec.json.encode(text)) for text in messages(batch.column("segments"))]
        return prompts, np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.int64)
