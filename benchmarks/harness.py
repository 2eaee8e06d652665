"""What all engines' runners share: one job in, three timed passes, one result out.

A runner is a script of its own, started in its engine's environment: ``python run_x.py job.json result.json``. Only
the standard library, psutil and ``workload`` are imported here, since peers live in environments without ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import psutil
from workload import Row, Workload


@dataclass
class Job:
    """What a runner is told. ``warm``, ``first`` and ``main`` are workload files of different texts.

    first: rows for the pass with one output token ("" leaves it out). variant: which way of one runner to take.
    """

    engine: str
    variant: str
    dtype: str
    threads: int
    model: str
    warm: str
    first: str
    main: str
    output_tokens: int


@dataclass
class Answer:
    """The answer to one row, in the order of the rows; ids or text, whichever the engine gives.

    cached: prompt tokens not computed, None if not told. prompt, output: numbers of tokens where they are not
    the workload's and that of ids.
    """

    ids: list[int] | None = None
    cached: int | None = None
    text: str | None = None
    prompt: int | None = None
    output: int | None = None


@dataclass
class Pass:
    """One timed pass. cpu_seconds and peak_bytes are of the whole process tree; forward_seconds where told."""

    rows: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    forward_seconds: float | None
    ids: list[list[int] | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)

    @property
    def computed_tokens(self) -> int | None:
        """Tokens that went through the layers: the prompts' less what was reused, and the answers' but the last."""
        if self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens + self.output_tokens - self.rows


class Engine(Protocol):
    """What a runner provides."""

    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        """Greedy answers to ``rows``, all handed over in one call."""

    def forward_seconds(self) -> float | None:
        """Seconds inside the model so far; None if the engine does not tell."""

    def processes(self) -> list[int]:
        """Processes that work for the engine, beyond this one and its children."""

    def close(self) -> None:
        """End what ``load`` started."""


class LibraryEngine:
    """The rest of an engine that is a library in this process and does not tell its forward time."""

    def forward_seconds(self) -> None:
        return None

    def processes(self) -> list[int]:
        return []

    def close(self) -> None:
        return None


class Meter:
    """CPU time and peak memory of this process, all below it, and ``others`` with all below them."""

    def __init__(self, others: Sequence[int] = ()) -> None:
        self.roots = [os.getpid(), *others]
        for process in self.tree():
            # 5 resets the peak resident size, so that loading does not count; not ours to reset for other users
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        self.before = self.cpu()
        self.start = time.perf_counter()

    def tree(self) -> set[psutil.Process]:
        found = set()
        for root in self.roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(root)
                found |= {process, *process.children(recursive=True)}
        return found

    def cpu(self) -> dict[psutil.Process, float]:
        """Seconds of CPU time per process, ended children counted with the parent that waited for them."""
        seconds = {}
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds[process] = float(sum(process.cpu_times()[:4]))
        return seconds

    def stop(self) -> tuple[float, float, int]:
        """Wall seconds, CPU seconds, peak resident bytes since the start."""
        wall = time.perf_counter() - self.start
        after = self.cpu()
        used = sum(after.values()) - sum(self.before.get(process, 0.0) for process in after)
        return wall, used, sum(peak_bytes(process.pid) for process in after)


def peak_bytes(pid: int) -> int:
    """The peak resident size of a process (Linux), 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def timed(engine: Engine, rows: Sequence[Row], max_tokens: int) -> Pass:
    """One pass over ``rows``, measured from handing over to the last answer."""
    forward = engine.forward_seconds()
    meter = Meter(engine.processes())
    answers = engine.answer(rows, max_tokens)
    wall, cpu, peak = meter.stop()
    inside = engine.forward_seconds()
    cached = [answer.cached for answer in answers]
    return Pass(
        rows=len(rows),
        seconds=wall,
        cpu_seconds=cpu,
        peak_bytes=peak,
        prompt_tokens=sum(
            len(row.ids) if answer.prompt is None else answer.prompt for answer, row in zip(answers, rows, strict=True)
        ),
        output_tokens=sum(len(answer.ids or ()) if answer.output is None else answer.output for answer in answers),
        cached_tokens=None if None in cached else sum(tokens or 0 for tokens in cached),
        forward_seconds=None if inside is None or forward is None else inside - forward,
        ids=[answer.ids for answer in answers],
        texts=[answer.text for answer in answers],
    )


def run(load: Callable[[Job], Engine], distribution: str) -> None:
    """The main function of a runner: load, warm up, one output token, all output tokens; write the passes.

    distribution: the package whose version the result names.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    started = time.perf_counter()
    engine = load(job)
    loaded = time.perf_counter() - started
    engine.answer(Workload.load(Path(job.warm)).rows, 2)
    result: dict[str, Any] = {
        "version": f"{distribution} {metadata.version(distribution)}",
        "load_seconds": loaded,
        "first": None,
    }
    if job.first:
        result["first"] = asdict(timed(engine, Workload.load(Path(job.first)).rows, 1))
    result["main"] = asdict(timed(engine, Workload.load(Path(job.main)).rows, job.output_tokens))
    engine.close()
    Path(sys.argv[2]).write_text(json.dumps(result))
