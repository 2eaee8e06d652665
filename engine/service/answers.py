"""What answers the rows of a task: the face that a stream has, to one engine, several, or another server."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa

from spark_llm.engine.service.protocol import StreamOpen, WindowRequest


class AnswerSource(Protocol):
    """Rows go in by ``send``, answers come out of ``receive`` in the order in which rows finish.

    Both sides may be used by different threads. stopped: no further row is answered, because the query has enough.
    """

    stopped: bool

    @property
    def unanswered(self) -> int:
        """How many rows have been sent and not been answered."""

    def send(self, batch: pa.RecordBatch) -> None:
        """Asks for the rows of ``batch`` (REQUEST_SCHEMA; ids not used before in this stream)."""

    def receive(self) -> pa.RecordBatch | None:
        """The next answers (ANSWER_SCHEMA, one row or more); None when every row sent has been received.

        Raises LlmError where the rows that are open cannot be answered, LimitReached where they need not be.
        """

    def close(self) -> None:
        """Ends the stream and cancels what is unanswered; may be called again, and from any thread."""


class Answerer(Protocol):
    """Whoever opens such streams for a task."""

    def stream(self, header: StreamOpen) -> AnswerSource:
        """Opens a stream of rows that share ``header``. Close it: that cancels what is unanswered."""

    def window(self, request: WindowRequest) -> int:
        """How many rows a task may ask next under a LIMIT; 0: the limit is reached."""
