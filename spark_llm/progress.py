"""The progress line on stderr while queries with ``llm(...)`` run: rows, tokens a second, time left.

A thread on the driver sleeps until a task says that it works, reads the tally twice a second, and sleeps again
when no task is left. ``spark.llm.progress`` of the query's session decides: auto is on where stderr is a
terminal; elsewhere lines are printed below each other, more seldom.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from spark_llm import report
from spark_llm.tally import Tally, TaskUpdate

if TYPE_CHECKING:
    from pyspark import StatusTracker
    from pyspark.sql import SparkSession

_log = logging.getLogger("spark_llm.progress")

REFRESH_SECONDS = 0.5
LINE_SECONDS = 5.0  # between lines where stderr is no terminal
RATE_SECONDS = 10.0  # over which tokens a second are measured
MAX_RATES = 100  # queries whose rates are kept

StageTasks = Callable[[int], tuple[int, int] | None]


def start(spark: SparkSession) -> None:
    """Have progress shown from now on, as ``spark.llm.progress`` says; once per SparkContext."""
    reports = report.install(spark)
    with _lock:
        if reports.tally not in _started:
            _started[reports.tally] = Progress(reports.tally, _stage_tasks(spark.sparkContext.statusTracker()))


@contextlib.contextmanager
def shown(spark: SparkSession, stream: TextIO | None = None) -> Iterator[None]:
    """Show progress inside this block whatever is configured, on ``stream`` (stderr when None)."""
    start(spark)
    progress = _started[report.install(spark).tally]
    progress.force(True, stream)
    try:
        yield
    finally:
        progress.force(False, None)


_lock = threading.Lock()
_started: weakref.WeakKeyDictionary[Tally, Progress] = weakref.WeakKeyDictionary()


class Progress:
    """The thread that writes the line; it ends when the tally is closed.

    ``stage_tasks`` tells of a stage how many tasks it has and how many of them are complete.
    """

    def __init__(self, tally: Tally, stage_tasks: StageTasks, stream: TextIO | None = None) -> None:
        self._tally = tally
        self._stage_tasks = stage_tasks
        self._stream = stream
        self._is_forced = False
        self._rates: dict[str, Rate] = {}
        self._last_line = -LINE_SECONDS
        self.thread = threading.Thread(target=self._run, name="spark-llm-progress", daemon=True)
        self.thread.start()

    def force(self, is_forced: bool, stream: TextIO | None) -> None:
        """Show progress whatever the session says, or no longer so."""
        self._is_forced, self._stream = is_forced, stream

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._show_while_working()
        except Exception as error:  # a line on a terminal must never cost a query
            _log.warning("The progress line ends: %s", error)

    def _wait_for_work(self) -> bool:
        with self._tally.changed:
            self._tally.changed.wait_for(lambda: self._tally.closed or self._tally.working())
        return not self._tally.closed

    def _show_while_working(self) -> None:
        width = 0
        out = self._stream or sys.stderr
        is_terminal = out.isatty()
        while (active := self._tally.active()) and not self._tally.closed:
            visible = {query: tasks for query, tasks in active.items() if self._is_visible(tasks, is_terminal)}
            if visible:
                query, tasks = list(visible.items())[-1]
                text = self._text(query, tasks, len(visible) - 1)
                now = time.monotonic()
                if is_terminal:
                    text = text[: shutil.get_terminal_size().columns - 1]
                    out.write(f"\r{text:<{width}}")
                    width = len(text)
                elif now - self._last_line >= LINE_SECONDS:
                    out.write(f"{text}\n")
                    self._last_line = now
                out.flush()
            with self._tally.changed:
                self._tally.changed.wait_for(lambda: self._tally.closed or not self._tally.working(), REFRESH_SECONDS)
        if width:
            out.write(f"\r{'':<{width}}\r")
            out.flush()

    def _is_visible(self, tasks: Sequence[TaskUpdate], is_terminal: bool) -> bool:
        setting = tasks[-1].progress
        return self._is_forced or setting == "true" or (setting == "auto" and is_terminal)

    def _rate(self, query: str) -> Rate:
        """The query's rate, kept while it has no task for a moment."""
        if query not in self._rates:
            self._rates[query] = Rate()
            if len(self._rates) > MAX_RATES:
                self._rates.pop(next(iter(self._rates)))
        return self._rates[query]

    def _text(self, query: str, tasks: Sequence[TaskUpdate], others: int) -> str:
        if not any(task.counts.first_sent for task in tasks):
            return f"llm query {query}: waiting for the engine to start"
        working = self._tally.working()
        alive = [task for task in tasks if task.ended or task.task in working]
        answered = sum(task.answered for task in alive)
        total = total_rows(alive, working, self._stage_tasks)
        rate = self._rate(query)
        rate.add(time.monotonic(), answered, sum(t.counts.computed_tokens + t.counts.output_tokens for t in alive))
        parts = [f"llm query {query}: {answered:,}" + (f" of {total:,} rows" if total else " rows")]
        if rate.tokens_per_second:
            parts.append(f"{rate.tokens_per_second:,.0f} tokens/s computed")
        if total and rate.rows_per_second:
            parts.append(f"{_clock((total - answered) / rate.rows_per_second)} left")
        if others:
            parts.append(f"and {others} more")
        return " | ".join(parts)


class Rate:
    """Rows and tokens (computed and generated) a second: rows since the start, tokens lately."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()
        self._first: tuple[float, int] | None = None
        self.rows_per_second = 0.0
        self.tokens_per_second = 0.0

    def add(self, now: float, rows: int, tokens: int) -> None:
        """Take note of the totals at the time ``now``, in seconds."""
        self._first = self._first or (now, rows)
        self._samples.append((now, rows, tokens))
        while len(self._samples) > 2 and self._samples[1][0] <= now - RATE_SECONDS:
            self._samples.popleft()
        seconds = now - self._samples[0][0]
        if seconds > 0:
            self.tokens_per_second = (tokens - self._samples[0][2]) / seconds
            self.rows_per_second = (rows - self._first[1]) / (now - self._first[0])


def total_rows(tasks: Sequence[TaskUpdate], working: frozenset[str], stage_tasks: StageTasks) -> int:
    """About how many rows the query's tasks have in all, 0 while that cannot be said.

    A task that has read its whole input is known; one that still reads, or has not begun, is taken to be like
    those that are known.
    """
    total = 0.0
    for stage in {task.stage for task in tasks}:
        members = [task for task in tasks if task.stage == stage]
        known = [task.read for task in members if task.ended]
        if not known:
            return 0
        mean = sum(known) / len(known)
        total += sum(known) + sum(max(task.read, mean) for task in members if not task.ended)
        numbers = stage_tasks(stage)
        if numbers is not None:
            calls = Counter(task.attempt for task in members)
            running = len({task.attempt for task in members if task.task in working})
            begun = max(len(calls), numbers[1] + running)
            total += mean * max(calls.values()) * max(0, numbers[0] - begun)
    return round(total)


def _stage_tasks(tracker: StatusTracker) -> StageTasks:
    def stage_tasks(stage: int) -> tuple[int, int] | None:
        info = tracker.getStageInfo(stage)
        return (info.numTasks, info.numCompletedTasks) if info else None

    return stage_tasks


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
