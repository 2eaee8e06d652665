"""One call's side of a task: which of its rows share a request, what is sent, and what came back.

Rows are looked up by their canonical arguments; what is new is rendered, sorted and sent, several rows in one prompt
where they may share it (shared_prompt.py). This module knows no Spark: it takes Arrow columns and open streams.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_llm.answer_form import USAGE_COLUMNS, Usage, detailed, row_choices, why_not
from spark_llm.call import AnswerForm, Detail, FieldSpec
from spark_llm.call_rows import Answers, Bools, CallRows, Ints, Request
from spark_llm.canonical import row_keys
from spark_llm.errors import LlmError, catalogue
from spark_llm.rendering import asks
from spark_llm.sending import Prompt, Prompts
from spark_llm.shared_prompt import Together, answers
from spark_llm.tally import Counts
from spark_llm.window_size import WindowSize

if TYPE_CHECKING:
    from spark_llm.engine.service.answers import AnswerSource
    from spark_llm.optimizer.reorder.order_table import OrderTable

REMEMBERED_WINDOWS = 4  # how many windows' worth of answers a task keeps for later equal rows

_OVER_BUDGET = "LLM_BUDGET_EXCEEDED"
_READ = ("id", "text", "error", "finish_reason", "folded", "stored", "confidence", *USAGE_COLUMNS)
_SUMMED = (
    "prompt_tokens",
    "instruction_tokens",
    "cached_tokens",
    "cached_instruction_tokens",
    "computed_tokens",
    "recomputed_tokens",
    "output_tokens",
)


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How a call's rows are answered.

    columns: which of a window's are the call's: prompt, fields, and the mask where ``masked``; None: all of them.
    call: what a row's answer depends on beside its arguments (``CallSpec.canonical``). window_rows: the most rows that
    are rendered and sent together. fold: equal rows share a request. seed: of sampled calls that are to repeat; drawn:
    what a row's draws depend on beside it (``CallSpec.drawn``). fail: a row that cannot be answered fails the query
    instead of being NULL; partial: one beyond the budget does not. order: the field order of each row, None as
    written. instruction_last: the fields stand before the prompt. together: how rows share prompts, None: they do not.
    form: what every answer must be, None: free text. details: what is told beside it.
    """

    fields: Sequence[FieldSpec]
    window_rows: int
    fold: bool
    columns: Sequence[int] | None = None
    masked: bool = False
    call: bytes = b""
    seed: int | None = None
    drawn: bytes = b""
    fail: bool = False
    partial: bool = False
    order: OrderTable | None = None
    instruction_last: bool = False
    together: Together | None = None
    form: AnswerForm | None = None
    details: Sequence[Detail] = ()


class Asker:
    """Asks for the rows of one call of a task; ``counts`` tell what came of them.

    ``open_stream`` is called when the first row needs the engine, ``open_shared`` for prompts with several rows.
    ``received``: rows whose answers came. ``window``: how many rows the next window may have.
    """

    def __init__(
        self,
        settings: AnswerSettings,
        open_stream: Callable[[], AnswerSource],
        open_shared: Callable[[], AnswerSource] | None = None,
    ) -> None:
        self.counts = Counts()
        self.received = 0
        self.window = WindowSize(settings.window_rows, settings.form is not None and settings.form.kind == "embedding")
        self._settings = settings
        self._prompts: Prompts[Request] = Prompts(settings, open_stream, open_shared)
        self._memory: OrderedDict[bytes, Request] = OrderedDict()

    @property
    def unanswered(self) -> int:
        """How many prompts wait for the engine."""
        return len(self._prompts.sent)

    def rows(self, columns: Sequence[pa.Array]) -> CallRows:
        """This call's part of a window; nothing is asked yet."""
        settings = self._settings
        own = list(columns) if settings.columns is None else [columns[number] for number in settings.columns]
        if settings.masked:
            mask = pc.fill_null(own.pop(), False).to_numpy(zero_copy_only=False)
        else:
            mask = np.ones(len(own[0]), np.bool_)
        return CallRows(own, mask, mask & self._asks(own), np.full(len(own[0]), -1, np.int64))

    def _asks(self, columns: Sequence[pa.Array]) -> Bools:
        """bool [rows]: the rows that ask something; where they bring their own choices, those that have some."""
        form, fields = self._settings.form, list(columns[1:])
        if form is None or form.field is None:
            return asks(columns[0], fields)
        choices = fields.pop(form.field)
        return asks(columns[0], fields) & np.array([bool(row_choices(text)) for text in choices.to_pylist()], np.bool_)

    def ask(self, rows: CallRows, wanted: Bools) -> None:
        """Ask for the rows of a window that are wanted and have not been asked; equal rows share a request."""
        positions = np.flatnonzero(wanted & rows.askable & (rows.request < 0))
        keys = self._keys(rows.columns, positions)
        numbers, new = self._join(rows, keys if self._settings.fold else [None] * len(positions))
        rows.request[positions] = numbers
        if len(new):
            requests = [rows.requests[number] for number in numbers[new]]
            rows.own += requests
            self._prompts.send([column.take(pa.array(positions[new])) for column in rows.columns], requests, keys[new])
            if not self.counts.first_sent:
                self.counts.first_sent = time.time()

    def receive(self) -> None:
        """Take the next answers in; some row has to wait for one. Raises LlmError (LLM_ROW_FAILED, LLM_BUDGET_EXCEEDED,
        whatever keeps the engine from going on), and LimitReached."""
        batch = self._prompts.receive()
        for name in _SUMMED:
            setattr(self.counts, name, getattr(self.counts, name) + int(np.sum(_column(batch, name))))
        self.counts.last_answer = time.time()
        columns = (batch[name].to_pylist() for name in _READ)
        for number, text, error, reason, folded, stored, confidence, *tokens in zip(*columns, strict=True):
            prompt = self._prompts.sent.pop(number)
            if error is not None and prompt.columns is not None and not error.startswith(f"[{_OVER_BUDGET}]"):
                self._prompts.split(prompt)
                continue
            rows = len(prompt.requests)
            self.received += rows
            error = error or self._why_not(prompt, text)
            if error is not None:
                for request in prompt.requests:
                    self._fail(self._settle(request, None, error, usage=Usage(*tokens)), error)
                continue
            if stored:
                self.counts.stored += rows
            elif folded:
                self.counts.duplicates += rows  # of a row of another task, or of an earlier evaluation
            else:
                self.counts.calls += 1
                self.counts.shared += rows - 1
            if prompt.columns is None:
                self._settle(prompt.requests[0], text, None, confidence, Usage(*tokens))
            else:
                self._read(prompt, text, reason == "length")

    def stop(self) -> None:
        """The query needs no more rows: what is unanswered stays so, and the engine is left alone."""
        for prompt in self._prompts.sent.values():
            for request in prompt.requests:
                self._done(request, None).void = "skipped"
        self._prompts.sent.clear()
        self.close()

    def close(self) -> None:
        """Close the streams, which cancels what is unanswered."""
        self._prompts.close()

    def count(self, rows: CallRows) -> None:
        """Count a window's rows, when their answers are handed out."""
        counts, asked = self.counts, rows.request >= 0
        counts.rows += len(asked)
        counts.nulls += int(np.count_nonzero(rows.needed & ~rows.askable))
        counts.skipped += int(np.count_nonzero(~rows.needed | (rows.askable & ~asked)))
        counts.duplicates += int(np.count_nonzero(asked)) - len(rows.own)
        if any(request.void for request in rows.requests):
            sizes = np.bincount(rows.request[asked], minlength=len(rows.requests)).tolist()
            for request, size in zip(rows.requests, sizes, strict=True):
                if request.void:
                    setattr(counts, request.void, getattr(counts, request.void) + size)
                    counts.duplicates -= size
            counts.duplicates += sum(bool(request.void) for request in rows.own)

    def _keys(self, columns: Sequence[pa.Array], positions: Ints) -> Answers:
        """The canonical arguments of rows, where they matter: bytes, else None."""
        keys = np.full(len(positions), None, np.object_)
        if self._settings.fold and len(positions):
            keys[:] = row_keys([column.take(pa.array(positions)) for column in columns], self._settings.call)
        return keys

    def _join(self, rows: CallRows, keys: Iterable[bytes | None]) -> tuple[Ints, Ints]:
        """Give a window its requests, one for equal keys, those of earlier windows too.

        For each key the number of its request in the window, and the positions of the keys whose request is new.
        """
        numbers, new = [], []
        own: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key is not None and key in own:
                numbers.append(own[key])
                continue
            request = self._memory.get(key) if key is not None else None
            if request is None:
                request = Request(key)
                new.append(position)
            if key is not None:
                own[key] = len(rows.requests)
                self._memory[key] = request
                self._memory.move_to_end(key)
            numbers.append(len(rows.requests))
            rows.requests.append(request)
            if not request.done:
                request.waiting.append(rows)
                rows.open += 1
        while len(self._memory) > REMEMBERED_WINDOWS * self.window.rows:
            self._memory.popitem(last=False)
        return np.array(numbers, np.int64), np.array(new, np.int64)

    def _read(self, prompt: Prompt[Request], text: str | None, is_cut: bool) -> None:
        """Take the answers of several rows in; those that are not clear are asked alone."""
        assert self._settings.together is not None
        found = answers(text or "", len(prompt.requests), is_cut, self._settings.together.stop)
        for request, answer in zip(prompt.requests, found, strict=True):
            if answer is not None:
                self._settle(request, answer)
        missing = [row for row, answer in enumerate(found) if answer is None]
        self.counts.asked_again += len(missing)
        self.received -= len(missing)
        if missing:
            self._prompts.send_alone(*prompt.part(missing))

    def _why_not(self, prompt: Prompt[Request], text: str | None) -> str | None:
        """The error of a row whose answer is none of its form."""
        form = self._settings.form
        if form is None or text is None:
            return None
        reason = why_not(form, text, prompt.choices)
        return None if reason is None else str(LlmError("LLM_INVALID_ANSWER", reason=reason))

    def _settle(
        self,
        request: Request,
        text: str | None,
        error: str | None = None,
        confidence: float | None = None,
        usage: Usage | None = None,
    ) -> Request:
        """The request has its answer, or failed; ``text`` as the model gave it."""
        self.window.told(text)
        details, form = self._settings.details, self._settings.form
        if not details:
            return self._done(request, text)
        if "usage" in details:
            request.again = detailed(details, form, text, error, confidence)
        return self._done(request, detailed(details, form, text, error, confidence, usage))

    def _done(self, request: Request, text: str | None) -> Request:
        request.text, request.done = text, True
        for rows in request.waiting:
            rows.open -= 1
        request.waiting.clear()
        return request

    def _fail(self, request: Request, error: str) -> None:
        if request.key is not None:
            self._memory.pop(request.key, None)  # an equal row later gets a chance of its own
        if error.startswith(f"[{_OVER_BUDGET}]"):
            if not self._settings.partial:
                raise _over_budget(error)
            request.void = "over_budget"
            return
        self.counts.fail(error)
        if self._settings.fail:
            raise LlmError("LLM_ROW_FAILED", reason=error)


def _over_budget(error: str) -> LlmError:
    """The LlmError whose text the engine sent."""
    message = re.sub(r"<(\w+)>", r"(?P<\1>.*)", re.escape(catalogue()[_OVER_BUDGET]["message"]))
    found = re.search(message, error)
    return LlmError(_OVER_BUDGET, **(found.groupdict() if found else {}))


def _column(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = batch[name].to_numpy()
    return values
