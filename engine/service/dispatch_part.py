"""The stream to one of several engines: it survives no loss, but hands back the rows that it had."""

from __future__ import annotations

import pyarrow as pa

from spark_llm.engine.service.stream import RESTARTS, AnswerStream
from spark_llm.errors import LlmError


class Part(AnswerStream):
    """An AnswerStream that is driven by another stream, which holds the condition ``changed`` that they share."""

    restarts = 0
    openings = 0

    @property
    def has_answers(self) -> bool:
        """Would ``take`` give some?"""
        return bool(self._answers)

    def take(self) -> pa.RecordBatch | None:
        """Answers that are there. The caller holds ``changed``."""
        return self._answers.popleft() if self._answers else None

    @property
    def error(self) -> BaseException | None:
        """What has ended the stream."""
        return self._error

    @property
    def is_lost(self) -> bool:
        """Has the engine been lost, or could it not be reached?"""
        return isinstance(self._error, LlmError) and self._error.condition == "LLM_ENGINE_LOST"

    @property
    def taken_in(self) -> bool:
        """Had the engine taken the stream in?"""
        return self._taken_in

    def abandon(self, reason: str) -> None:
        """Take the engine for lost."""
        with self._changed:
            if self._error is None:
                self._error = self._lost(1, reason)
                self._changed.notify_all()
        if self._reader is not None:
            self._reader.cancel()

    def stop(self) -> None:
        """Cancel what is unanswered, without waiting: nobody needs it."""
        with self._changed:
            self.stopped = True
        if self._reader is not None:
            self._reader.cancel()

    def leave(self) -> tuple[list[pa.RecordBatch], list[pa.RecordBatch]]:
        """The rows without an answer and the answers not taken: the caller's from now on. Later answers are dropped."""
        with self._changed:
            self._closed = True
            rest = [window.rest() for window in dict.fromkeys(self._windows.values())]
            answers = list(self._answers)
            self._windows.clear()
            self._answers.clear()
        return rest, answers

    def give_up(self, rows: int) -> LlmError:
        """The loss as an error of the whole stream, which has so many open rows."""
        assert isinstance(self._error, LlmError)
        times = str(RESTARTS + 1)
        return LlmError(self._error.condition, **self._error.parameters | {"times": times, "rows": str(rows)})
