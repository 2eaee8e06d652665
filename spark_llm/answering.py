"""Windows of rows in, answers out in the rows' order: what a task does between Spark and its engine.

A window goes through the task's calls: all at once, or one after the other where a filter's conditions drop rows on the
way. Several windows are in flight, so that the engine has work while Spark reads and writes; under a limit it is one,
of the size that the engine grants, and none once the query has its rows. Where one match of a join's left row is
enough, a window's pairs are asked in rounds (first_match.py). This module knows no Spark.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from spark_llm.asking import Asker
from spark_llm.call import Condition
from spark_llm.call_rows import Answers, Bools, CallRows, Ints
from spark_llm.condition import judge
from spark_llm.engine.service.client import LimitReached
from spark_llm.first_match import FirstMatches, PairWindow
from spark_llm.predicate_order import PredicateOrder

_VERDICTS = 10_000  # on rows with equal answers that are remembered
_PAIR_BYTES = 64 << 20  # of pairs that are read ahead, since at first few of them are asked

# (rows finished so far, how many of them are hits, the input has ended) -> rows to ask next; 0: the query has enough.
Grant = Callable[[int, int, bool], int]


@dataclass(frozen=True, kw_only=True)
class Flow:
    """How windows go through the calls.

    window_rows: the most rows of a window. windows_in_flight: how many windows' rows of a call may wait for the engine.
    conditions: on the answers; a row that cannot meet one of them is not asked any further. order: what is known of the
    calls' costs; None: all calls are asked at once. grant: asked for the size of each window, under a limit. pair: the
    column with the id of each row's left row, where the rows are a join's pairs and the first that meets the conditions
    is enough; None: they are not. together: how many of these pairs share a prompt.
    """

    window_rows: int
    windows_in_flight: int
    conditions: Sequence[Condition] = ()
    order: PredicateOrder | None = None
    grant: Grant | None = None
    pair: int | None = None
    together: int = 1


class RowSource:
    """Rows in batches of any size -> windows of the sizes that are asked for."""

    def __init__(self, batches: Iterable[Sequence[pa.Array]]) -> None:
        self._batches = iter(batches)
        self._batch: Sequence[pa.Array] = ()
        self._start = 0

    def take(self, rows: int) -> list[pa.Array] | None:
        """The columns of the next ``rows`` rows, of fewer at the end; None when there are no more."""
        parts: list[Sequence[pa.Array]] = []
        missing = rows
        while missing:
            left = len(self._batch[0]) - self._start if self._batch else 0
            if not left:
                batch = next(self._batches, None)
                if batch is None:
                    break
                self._batch, self._start = batch, 0
                continue
            taken = min(missing, left)
            parts.append([column.slice(self._start, taken) for column in self._batch])
            self._start += taken
            missing -= taken
        return [pa.concat_arrays(columns) for columns in zip(*parts, strict=True)] if parts else None


@dataclass(slots=True, eq=False)
class _Window:
    """alive: bool [rows], the rows that no condition has dropped. plan: int64 [rows, calls], the calls of each row in
    the order in which they are asked, None: all at once. stage: how many stages have been asked. learns: its rows take
    turns, and the windows behind it wait for what it finds. pairs: of a join; then ``turn``, bool [rows], are those of
    the current round. size: bytes."""

    calls: list[CallRows]
    alive: Bools
    plan: Ints | None = None
    learns: bool = False
    stage: int = 0
    done: bool = False
    hits: int = 0
    pairs: PairWindow | None = None
    turn: Bools | None = None
    size: int = 0

    def is_open(self) -> bool:
        return any(rows.open for rows in self.calls)

    def asked_now(self) -> Bools:
        """The rows that no condition has dropped, of the current round."""
        return self.alive if self.turn is None else self.alive & self.turn

    def asked_in(self, stage: int, call: int) -> Bools:
        """The rows that are asked about a call in this stage, if they are alive then."""
        return np.ones(len(self.alive), np.bool_) if self.plan is None else self.plan[:, stage] == call


class Answering:
    """Answers one task's rows; ``read``, ``ended``, ``answered`` and the askers' counts tell how far it is.

    ``on_progress(is_due)`` is called after answers came, and with True before a window is handed out, when counts have
    to be told. ``on_wait()`` is called before waiting for input or answers, when what was handed out should be on its
    way.
    """

    def __init__(self, askers: Sequence[Asker], flow: Flow) -> None:
        self.on_progress: Callable[[bool], None] = lambda is_due: None
        self.on_wait: Callable[[], None] = lambda: None
        self.askers = askers
        self.read = 0
        self.ended = False
        self._flow = flow
        self._judges = bool(flow.conditions) and (
            flow.order is not None or flow.grant is not None or flow.pair is not None
        )
        self._matches = FirstMatches(first=flow.together)
        self._queue: deque[_Window] = deque()
        self._verdicts: dict[tuple[object, ...], bool | None] = {}
        self._known = [(0, 0)] * len(askers)  # answers and tokens that the order has heard of
        self._finished = 0
        self._hits = 0
        self._enough = False

    @property
    def _window_rows(self) -> int:
        return min([self._flow.window_rows, *(asker.window.rows for asker in self.askers)])

    def answered(self, call: int) -> int:
        """About how many rows have their answer to a call, handed out or not."""
        waiting = sum(len(window.alive) if window.done else window.calls[call].answered() for window in self._queue)
        return self.askers[call].counts.rows + waiting

    def run(self, source: RowSource) -> Iterator[list[Answers]]:
        """Answer the rows of all windows, for each window an array for each call; closes the streams however it ends.

        Raises LlmError: LLM_ROW_FAILED, LLM_BUDGET_EXCEEDED, or whatever keeps the engine from starting or going on.
        """
        try:
            while True:
                while self._may_take():
                    self.on_wait()
                    self._take(source)
                if not self._queue:
                    return
                if not self._queue[0].done:
                    self.on_wait()
                    self._receive()
                    continue
                texts = self._finish(self._queue.popleft())
                self.on_progress(True)
                yield texts
        finally:
            for asker in self.askers:
                asker.close()

    def _may_take(self) -> bool:
        flow = self._flow
        if self.ended or not self._queue:
            return not self.ended
        if (flow.grant is not None and not self._enough) or any(window.learns for window in self._queue):
            return False
        most = self._window_rows * flow.windows_in_flight
        has_room = len(self._queue) <= flow.windows_in_flight
        if flow.pair is not None:
            size = sum(window.size for window in self._queue)
            has_room = has_room or (size < _PAIR_BYTES and not self._is_stuck(self._queue[-1]))
        return has_room and all(asker.unanswered + self._window_rows <= most for asker in self.askers)

    def _take(self, source: RowSource) -> None:
        order = self._flow.order
        size = self._granted()
        if order is not None and order.left and not self._enough:
            size = min(size, order.left)
        columns = source.take(size)
        if columns is None:
            self.ended = True
            if self._flow.grant is not None and not self._enough:
                self._flow.grant(self._finished, self._hits, True)
            return
        rows = len(columns[0])
        self.read += rows
        window = _Window([asker.rows(columns) for asker in self.askers], np.full(rows, not self._enough))
        if order is not None and not self._enough:
            window.learns = order.left > 0
            window.plan = order.plan(rows)
        if (pair := self._flow.pair) is not None:
            window.pairs = self._matches.window(columns[pair].to_numpy())
            window.turn = np.zeros(rows, np.bool_)
            window.size = sum(column.nbytes for column in columns)
        self._queue.append(window)
        self._advance(window)

    def _granted(self) -> int:
        flow = self._flow
        rows = self._window_rows
        if flow.grant is None or self._enough:
            return rows
        size = flow.grant(self._finished, self._hits, False)
        if not size:
            self._stop()
        return min(size, rows) or rows

    def _receive(self) -> None:
        """Wait for an answer that the oldest window needs."""
        waiting = next(call for call, rows in enumerate(self._queue[0].calls) if rows.open)
        try:
            self.askers[waiting].receive()
        except LimitReached:
            self._stop()
        for window in self._queue:
            self._advance(window)
        self.on_progress(False)

    def _stop(self) -> None:
        """The query has its rows: no engine is asked any more."""
        self._enough = True
        for asker in self.askers:
            asker.stop()
        for window in self._queue:
            window.alive[:] = False

    def _advance(self, window: _Window) -> None:
        """Judge what is answered of a window, and ask its next stage, until it has to wait or is done."""
        if self._is_stuck(window):
            return
        stages = 1 if window.plan is None else window.plan.shape[1]
        while not window.done and not window.is_open():
            if self._judges and window.alive.any():
                self._judge(window)
            if window.stage == stages or not window.asked_now().any():
                if not self._next_round(window):
                    return
                continue
            for call, (asker, rows) in enumerate(zip(self.askers, window.calls, strict=True)):
                asker.ask(rows, window.asked_now() & window.asked_in(window.stage, call))
            window.stage += 1

    def _is_stuck(self, window: _Window) -> bool:
        """Does the window wait for earlier ones with the same left rows, which have found nothing new?"""
        return window.pairs is not None and not window.done and window.pairs.stuck == self._matches.changes

    def _next_round(self, window: _Window) -> bool:
        """Begin the next round of a window's pairs; False: there is none, now or at all (then the window is done)."""
        if window.pairs is not None:
            window.turn = self._matches.next_round(window.pairs, window.alive)
            window.stage = 0
            if window.turn.any():
                return True
            if (window.alive & ~window.pairs.had).any():
                return False  # an earlier window asks about the same left rows
        window.done, window.learns = True, False
        return False

    def _judge(self, window: _Window) -> None:
        """Drop the rows that cannot meet the conditions any more, and count those that do."""
        known = [(rows.request >= 0) | ~rows.askable for rows in window.calls]
        before = window.asked_now().copy()
        positions = np.flatnonzero(before & np.logical_or.reduce(known))
        answers = [rows.texts()[positions].tolist() for rows in window.calls]
        masks = [is_known[positions].tolist() for is_known in known]
        verdicts = [
            self._verdict(row[: len(answers)], row[len(answers) :]) for row in zip(*answers, *masks, strict=True)
        ]
        window.alive[positions[[verdict is False for verdict in verdicts]]] = False
        window.hits = sum(verdict is True for verdict in verdicts)
        if window.pairs is not None:
            self._matches.found(window.pairs, positions[[verdict is True for verdict in verdicts]], window.alive)
        if window.stage:
            self._learn(window, before)

    def _verdict(self, answers: tuple[str | None, ...], known: tuple[bool, ...]) -> bool | None:
        row = (answers, known)
        if row not in self._verdicts:
            if len(self._verdicts) >= _VERDICTS:
                self._verdicts.clear()
            self._verdicts[row] = judge(self._flow.conditions, answers, known)
        return self._verdicts[row]

    def _learn(self, window: _Window, before: Bools) -> None:
        """Tell the order what the last stage cost and dropped. before: the rows that were alive then."""
        order = self._flow.order
        if order is None:
            return
        for call, (asker, rows) in enumerate(zip(self.askers, window.calls, strict=True)):
            asked = before & (rows.request >= 0) & window.asked_in(window.stage - 1, call)
            order.judged(call, int(np.count_nonzero(asked)), int(np.count_nonzero(asked & ~window.alive)))
            now = (asker.received, asker.counts.prompt_tokens + asker.counts.output_tokens)
            order.received(call, now[0] - self._known[call][0], now[1] - self._known[call][1])
            self._known[call] = now

    def _finish(self, window: _Window) -> list[Answers]:
        for asker, rows in zip(self.askers, window.calls, strict=True):
            asker.count(rows)
        self._finished += len(window.alive)
        self._hits += window.hits
        return [rows.texts() for rows in window.calls]
