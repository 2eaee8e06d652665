"""Windows of rows in, answers out in the rows' order: what a task does between Spark and its engine.

A window's rows are looked up by their canonical arguments; what is new is rendered, sorted and sent. Several windows
are in flight, so that the engine has work while Spark reads and writes. This module knows no Spark: it takes Arrow
columns and an open stream.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_llm.call import FieldSpec
from spark_llm.canonical import row_keys, row_seed
from spark_llm.errors import LlmError
from spark_llm.optimizer.reorder.hashing import hash_values
from spark_llm.optimizer.reorder.window import prefix_order
from spark_llm.prompt import asks, render, request_batch
from spark_llm.tally import Counts

if TYPE_CHECKING:
    from spark_llm.engine.service.client import AnswerStream
    from spark_llm.optimizer.reorder.order_table import OrderTable

Ints = npt.NDArray[np.int64]
Answers = npt.NDArray[np.object_]

REMEMBERED_WINDOWS = 4  # how many windows' worth of answers a task keeps for later equal rows

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
    """How a task's rows are answered.

    call: what a row's answer depends on beside its arguments (``CallSpec.canonical``). window_rows: rows rendered and
    sent together. windows_in_flight: how many windows' rows may wait for the engine. fold: equal rows share a call.
    seed: of sampled calls that are to repeat; drawn: what a row's draws depend on beside it (``CallSpec.drawn``).
    fail: a row that cannot be answered fails the query instead of being NULL. order: the field order of each row, None
    as written. instruction_last: the fields stand before the prompt.
    """

    fields: Sequence[FieldSpec]
    window_rows: int
    windows_in_flight: int
    fold: bool
    call: bytes = b""
    seed: int | None = None
    drawn: bytes = b""
    fail: bool = False
    order: OrderTable | None = None
    instruction_last: bool = False


@dataclass(slots=True, eq=False)
class _Call:
    """One request and the windows that wait for it."""

    key: bytes | None
    text: str | None = None
    done: bool = False
    waiting: list[_Window] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Window:
    """``call`` [rows] are numbers into ``calls``, -1 for a row without a call.

    ``open`` of the calls are unanswered; ``own`` were sent for this window, the others for earlier ones.
    """

    call: Ints
    calls: list[_Call]
    open: int = 0
    own: int = 0

    def answered(self) -> int:
        """About how many rows have their answer."""
        rows = len(self.call)
        return rows * (len(self.calls) - self.open) // len(self.calls) if self.open else rows

    def texts(self) -> Answers:
        return np.array([*(call.text for call in self.calls), None], dtype=object)[self.call]


class Answering:
    """Answers one task's rows; ``counts``, ``read`` and ``ended`` tell how far it is.

    ``open_stream`` is called when the first row needs the engine. ``on_progress(is_due)`` is called after
    answers came, and with True before a window is handed out, when counts have to be told. ``on_wait()`` is
    called before waiting for input or answers, when what was handed out should be on its way.
    """

    def __init__(self, settings: AnswerSettings, open_stream: Callable[[], AnswerStream]) -> None:
        self.on_progress: Callable[[bool], None] = lambda is_due: None
        self.on_wait: Callable[[], None] = lambda: None
        self.counts = Counts()
        self.read = 0
        self.ended = False
        self._settings = settings
        self._open_stream = open_stream
        self._stream: AnswerStream | None = None
        self._queue: deque[_Window] = deque()
        self._asked: dict[int, _Call] = {}
        self._memory: OrderedDict[bytes, _Call] = OrderedDict()
        self._next_id = 0

    @property
    def answered(self) -> int:
        """Rows whose answer is known, handed out or not."""
        return self.counts.rows + sum(window.answered() for window in self._queue)

    def run(self, windows: Iterator[list[pa.Array]]) -> Iterator[Answers]:
        """Answer windows of columns (prompt, then fields); closes the stream however it ends.

        Raises LlmError: LLM_ROW_FAILED, or whatever keeps the engine from starting or going on.
        """
        most_asked = self._settings.window_rows * self._settings.windows_in_flight
        try:
            while True:
                while (
                    not self.ended
                    and len(self._queue) <= self._settings.windows_in_flight
                    and len(self._asked) + self._settings.window_rows <= most_asked
                ):
                    self.on_wait()
                    self._take(next(windows, None))
                if not self._queue:
                    return
                if self._queue[0].open:
                    self.on_wait()
                    self._receive()
                    continue
                texts = self._queue[0].texts()
                self._count_rows(self._queue.popleft())
                self.on_progress(True)
                yield texts
        finally:
            if self._stream is not None:
                self._stream.close()

    def _take(self, columns: list[pa.Array] | None) -> None:
        if columns is None:
            self.ended = True
            return
        self.read += len(columns[0])
        rows = np.flatnonzero(asks(columns[0], columns[1:]))
        keys = self._keys(columns, rows)
        call = np.full(len(columns[0]), -1, np.int64)
        window = _Window(call, [])
        call[rows], new = self._join(window, keys if self._settings.fold else [None] * len(rows))
        window.own = len(new)
        if len(new):
            self._send([column.take(pa.array(rows[new])) for column in columns], window, call[rows[new]], keys[new])
        self._queue.append(window)

    def _keys(self, columns: list[pa.Array], rows: Ints) -> Answers:
        """The canonical arguments of ``rows``, where they matter: bytes, else None."""
        keys = np.full(len(rows), None, np.object_)
        if self._settings.fold and len(rows):
            keys[:] = row_keys([column.take(pa.array(rows)) for column in columns], self._settings.call)
        return keys

    def _join(self, window: _Window, keys: Iterable[bytes | None]) -> tuple[Ints, Ints]:
        """Give a window its calls, one for equal keys, those of earlier windows too.

        For each key the number of its call in the window, and the positions of the keys whose call is new.
        """
        numbers, new = [], []
        own: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key is not None and key in own:
                numbers.append(own[key])
                continue
            call = self._memory.get(key) if key is not None else None
            if call is None:
                call = _Call(key)
                new.append(position)
            if key is not None:
                own[key] = len(window.calls)
                self._memory[key] = call
                self._memory.move_to_end(key)
            numbers.append(len(window.calls))
            window.calls.append(call)
            if not call.done:
                call.waiting.append(window)
                window.open += 1
        while len(self._memory) > REMEMBERED_WINDOWS * self._settings.window_rows:
            self._memory.popitem(last=False)
        return np.array(numbers, np.int64), np.array(new, np.int64)

    def _send(self, columns: list[pa.Array], window: _Window, numbers: Ints, keys: Answers) -> None:
        """Ask for rows in prefix order. numbers: of their calls in the window; keys: their canonical arguments."""
        settings = self._settings
        orders = None
        if settings.order is not None and len(columns) > 1:
            orders = settings.order.orders(np.stack([hash_values(column) for column in columns[1:]], axis=1))
        rendered = render(columns[0], columns[1:], settings.fields, orders, settings.instruction_last)
        order = prefix_order(rendered.codes)
        batch = request_batch(
            rendered,
            order,
            self._next_id,
            keys=keys[order].tolist() if settings.fold else None,
            seeds=self._seeds(columns, order),
        )
        calls = [window.calls[number] for number in numbers[order]]
        self._asked.update(enumerate(calls, self._next_id))
        self._next_id += len(calls)
        if self._stream is None:
            self._stream = self._open_stream()
        if not self.counts.first_sent:
            self.counts.first_sent = time.time()
        self._stream.send(batch)

    def _seeds(self, columns: list[pa.Array], order: Ints) -> list[int] | None:
        """For draws that repeat, the seed of each row, in this order."""
        seed = self._settings.seed
        if seed is None:
            return None
        keys = row_keys(columns, self._settings.drawn)
        return [row_seed(seed, keys[row]) for row in order.tolist()]

    def _receive(self) -> None:
        assert self._stream is not None
        batch = self._stream.receive()
        assert batch is not None, "the stream knows of no open row, but rows are open"
        for name in _SUMMED:
            setattr(self.counts, name, getattr(self.counts, name) + int(np.sum(_column(batch, name))))
        columns = (batch[name].to_pylist() for name in ("id", "text", "error", "folded"))
        for number, text, error, folded in zip(*columns, strict=True):
            self._settle(self._asked.pop(number), text, error, folded)
        self.counts.last_answer = time.time()
        self.on_progress(False)

    def _settle(self, call: _Call, text: str | None, error: str | None, folded: bool) -> None:
        call.text, call.done = text, True
        for window in call.waiting:
            window.open -= 1
        call.waiting.clear()
        if error is None:
            self.counts.calls += not folded
            self.counts.duplicates += folded  # of a row of another task, or of an earlier evaluation
            return
        if call.key is not None:
            self._memory.pop(call.key, None)  # an equal row later gets a chance of its own
        self.counts.fail(error)
        if self._settings.fail:
            raise LlmError("LLM_ROW_FAILED", reason=error)

    def _count_rows(self, window: _Window) -> None:
        nulls = int(np.count_nonzero(window.call < 0))
        self.counts.rows += len(window.call)
        self.counts.nulls += nulls
        self.counts.duplicates += len(window.call) - nulls - window.own


def _column(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = batch[name].to_numpy()
    return values


def rechunk(batches: Iterable[Sequence[pa.Array]], rows: int) -> Iterator[list[pa.Array]]:
    """Columns in batches of any size -> columns in windows of ``rows``, the last one shorter."""
    held: list[Sequence[pa.Array]] = []
    count = 0
    for batch in batches:
        start, size = 0, len(batch[0])
        while start < size:
            taken = min(rows - count, size - start)
            held.append([column.slice(start, taken) for column in batch])
            start += taken
            count += taken
            if count == rows:
                yield _joined(held)
                held, count = [], 0
    if count:
        yield _joined(held)


def _joined(parts: list[Sequence[pa.Array]]) -> list[pa.Array]:
    return [pa.concat_arrays(columns) for columns in zip(*parts, strict=True)]
