"""The progress line: what it says, where it shows, and that it ends."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest

from spark_llm import progress as module
from spark_llm.progress import Progress, Rate, total_rows
from spark_llm.tally import Counts, Tally, TaskUpdate


class Terminal(io.StringIO):
    """A stream that says what it is and when something was written."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal
        self.written = threading.Event()

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


def task(name: str, read: int = 0, answered: int = 0, ended: bool = False, **more: object) -> TaskUpdate:
    return TaskUpdate(
        query="4",
        task=name,
        stage=0,
        attempt=int(more.pop("attempt", ord(name))),  # type: ignore[call-overload]
        read=read,
        answered=answered,
        ended=ended,
        number=1,
        counts=Counts(rows=answered, first_sent=1.0),
        **more,  # type: ignore[arg-type]
    )


def four_tasks(stage: int) -> tuple[int, int] | None:
    return (4, 1)


@pytest.fixture
def tally() -> Iterator[Tally]:
    tally = Tally()
    yield tally
    tally.close()


def run(tally: Tally, stream: Terminal, update: TaskUpdate, force: bool = False) -> str:
    """The text written while one task works."""
    progress = Progress(tally, four_tasks, stream)
    if force:
        progress.force(True, stream)
    tally.merge(update)
    tally.connected(update)
    stream.written.wait(2 if force or update.progress == "true" or stream.is_terminal else 0.1)
    tally.gone(update.task)
    tally.close()
    progress.thread.join(10)
    assert not progress.thread.is_alive()
    return stream.getvalue()


def test_a_terminal_gets_one_line_that_is_cleared(tally: Tally) -> None:
    text = run(tally, Terminal(True), task("a", read=100, answered=40, ended=True))
    assert text.startswith("\rllm query 4: 40 of 300 rows")
    assert text.endswith("\r")
    assert "\n" not in text


def test_auto_is_silent_where_there_is_no_terminal(tally: Tally) -> None:
    assert run(tally, Terminal(False), task("a", read=100)) == ""


def test_true_prints_lines_where_there_is_no_terminal(tally: Tally) -> None:
    assert run(tally, Terminal(False), task("a", answered=7, progress="true")) == ("llm query 4: 7 rows\n")


def test_a_task_without_an_engine_yet_says_so(tally: Tally) -> None:
    update = task("a", progress="true")
    update.counts.first_sent = 0.0
    assert run(tally, Terminal(False), update) == "llm query 4: waiting for the engine to start\n"


def test_false_is_silent_unless_forced(tally: Tally) -> None:
    assert run(tally, Terminal(False), task("a", answered=7, progress="false"), force=True).startswith("llm query 4")


def test_false_is_silent_on_a_terminal(tally: Tally) -> None:
    stream = Terminal(True)
    stream.written.wait = lambda timeout=None: False  # type: ignore[method-assign]
    assert run(tally, stream, task("a", progress="false")) == ""


def test_a_broken_stream_ends_the_line_only(tally: Tally, caplog: pytest.LogCaptureFixture) -> None:
    stream = Terminal(True)
    stream.close()
    progress = Progress(tally, four_tasks, stream)
    tally.connected(task("a"))
    tally.merge(task("a"))
    progress.thread.join(10)
    assert not progress.thread.is_alive()
    assert "progress line ends" in caplog.text


def test_total_counts_known_reading_and_coming_tasks() -> None:
    tasks = [task("a", read=100, ended=True), task("b", read=30), task("c", read=170)]
    assert total_rows(tasks, frozenset("bc"), lambda stage: (5, 1)) == 100 + 100 + 170 + 2 * 100
    assert total_rows(tasks, frozenset("bc"), lambda stage: None) == 370
    assert total_rows(tasks[1:], frozenset("bc"), four_tasks) == 0


def test_total_counts_every_call_of_a_coming_task() -> None:
    tasks = [task("a", read=100, ended=True, attempt=1), task("b", read=100, ended=True, attempt=1)]
    assert total_rows(tasks, frozenset("ab"), lambda stage: (3, 0)) == 200 + 2 * 200


def test_rates() -> None:
    rate = Rate()
    rate.add(100.0, 0, 0)
    assert rate.tokens_per_second == 0
    rate.add(102.0, 10, 400)
    assert (rate.rows_per_second, rate.tokens_per_second) == (5, 200)
    rate.add(113.0, 13, 400)
    assert (rate.rows_per_second, rate.tokens_per_second) == (1, 0)


def test_time_left_is_told_as_a_clock() -> None:
    assert [module._clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
