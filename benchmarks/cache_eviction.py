"""What a prefix cache finds that holds a part of the working set: LRU against eviction by what the rows to come need.

    .venv/bin/python benchmarks/cache_eviction.py

Real scheduler, cache and hints, no model: a stand-in emits one token a row and step. Tasks send windows of rows in
prefix order, several in flight, as Spark tasks do. The working set is all distinct prompt tokens of a load; the column
"all" is a cache that holds all of it, the most that any eviction can reach in this order of arrival.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import Machine, this_machine

from spark_llm.engine.cache.eviction import LeastRecentlyUsed, NeededLast
from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.prefix import shared_with_next, sort_key
from spark_llm.engine.request import Hints, Request, SamplingParams
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

SHARES = (0.1, 0.25, 0.5)  # of the working set
GROUPS, ROWS = 160, 20  # groups and rows in each
TEMPLATE, GROUP, OWN, INSTRUCTION, OUTPUT = 16, 120, 40, 24, 4  # tokens
WINDOW, IN_FLIGHT = 512, 4  # rows, windows
BATCH, RUNNING = 1024, 64  # tokens of a step, rows
AGAIN, NARROW = 160, 32  # rows after which rows come again that no hint announces, and of a window that cannot show it
QUERY = "1"
OUT = Path(__file__).resolve().parent.parent / "artifacts" / "cache_eviction.json"

Tokens = npt.NDArray[np.int32]


@dataclass
class Task:
    """A stream of rows. after: the task whose answers it waits for.

    pipelined: it asks a row as soon as the other task has its answer, else when all rows are answered.
    """

    prompts: list[Tokens]
    shared: int = 0
    later_calls: int = 0
    after: Task | None = None
    pipelined: bool = False
    query: str = QUERY
    window: int = WINDOW
    stream: int = -1
    sent: int = 0
    answered: int = 0

    @property
    def ready(self) -> int:
        """How many of its rows may be asked."""
        if self.after is None or self.after.answered == len(self.after.prompts):
            return len(self.prompts)
        return self.after.answered * len(self.prompts) // len(self.after.prompts) if self.pipelined else 0

    def windows(self) -> Iterator[list[Tokens]]:
        """What it sends now: whole windows while few enough are in flight."""
        while self.sent < len(self.prompts) and self.sent - self.answered <= (IN_FLIGHT - 1) * self.window:
            end = min(self.sent + self.window, len(self.prompts))
            if end > self.ready:
                return
            window = self.prompts[self.sent : end]
            self.sent = end
            yield sorted(window, key=sort_key)


@dataclass(frozen=True)
class Result:
    """Of one load with one cache. Tokens are those of prompts; seconds are processor time."""

    load: str
    share: float
    eviction: str
    prompt_tokens: int
    computed_tokens: int
    seconds: float

    @property
    def hits(self) -> float:
        """Share of the prompt tokens that were found."""
        return 1 - self.computed_tokens / self.prompt_tokens


@dataclass
class Table:
    """Rows of ``GROUPS`` groups: a field that a group shares, and one of each row's own."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        self.template = self.draw(TEMPLATE)
        groups = [self.draw(GROUP) for _ in range(GROUPS)]
        self.rows = [np.concatenate([group, self.draw(OWN)]) for group in groups for _ in range(ROWS)]

    def draw(self, tokens: int) -> Tokens:
        return self.rng.integers(0, 49_152, tokens, dtype=np.int32)

    def ordered(self) -> list[int]:
        return sorted(range(len(self.rows)), key=lambda row: sort_key(self.rows[row]))

    def shuffled(self) -> list[int]:
        return [int(row) for row in self.rng.permutation(len(self.rows))]

    def instruction_first(self, order: list[int]) -> list[Tokens]:
        """One call's prompts."""
        return [np.concatenate([self.template, self.rows[row]]) for row in order]

    def calls(self, order: list[int], count: int) -> list[list[Tokens]]:
        """Prompts of several calls over the same fields: fields first."""
        instructions = [self.draw(INSTRUCTION) for _ in range(count)]
        return [[np.concatenate([self.template, self.rows[row], ask]) for row in order] for ask in instructions]


def successive(prompts: list[list[Tokens]], *, pipelined: bool, announced: bool = True) -> list[Task]:
    """Tasks of calls over the same fields, each after the one before."""
    tasks: list[Task] = []
    for at, call in enumerate(prompts):
        shared, later = (TEMPLATE + GROUP + OWN, len(prompts) - 1 - at) if announced else (0, 0)
        query = QUERY if announced else str(at)
        tasks.append(Task(call, shared, later, tasks[-1] if tasks else None, pipelined, query))
    return tasks


def filtered(calls: list[list[Tokens]], share: float, rng: np.random.Generator) -> list[Task]:
    """Two calls, the second one only for rows that the first one lets through."""
    tasks = successive(calls, pipelined=True)
    passes = rng.random(len(calls[0])) < share
    tasks[1].prompts = [prompt for prompt, passed in zip(calls[1], passes, strict=True) if passed]
    return tasks


def loads() -> Iterator[tuple[str, list[Task]]]:
    """Every load by name, made anew at each call."""
    table = Table()
    ordered, shuffled = table.ordered(), table.shuffled()
    half = len(ordered) // 2
    yield "one call, rows in prefix order", [Task(table.instruction_first(ordered))]
    yield "one call, rows as stored", [Task(table.instruction_first(shuffled))]
    yield (
        "two tasks, rows in prefix order",
        [Task(table.instruction_first(rows)) for rows in (ordered[:half], ordered[half:])],
    )
    yield "two tasks, rows as stored", [Task(table.instruction_first(rows)) for rows in (shuffled[::2], shuffled[1::2])]
    yield "two calls, one after the other", successive(table.calls(ordered, 2), pipelined=False)
    yield "three calls, one after the other", successive(table.calls(ordered, 3), pipelined=False)
    yield "two calls, as stored", successive(table.calls(shuffled, 2), pipelined=False)
    yield "two calls, window by window", successive(table.calls(ordered, 2), pipelined=True)
    yield "the same, 30 % pass the first", filtered(table.calls(ordered, 2), 0.3, table.rng)
    two = [successive(table.calls(rows, 2), pipelined=False) for rows in (ordered[:half], ordered[half:])]
    yield "two tasks of two calls", [task for tasks in two for task in tasks]
    once = table.instruction_first(ordered)
    yield "a query twice, unannounced", successive([once, once], pipelined=False, announced=False)
    singles = [table.draw(TEMPLATE + GROUP + OWN) for _ in range(GROUPS * ROWS // 2)]
    again = [row for at in range(0, len(singles), AGAIN) for row in singles[at : at + AGAIN] * 2]
    tasks = successive([once, again], pipelined=False, announced=False)
    tasks[1].window = NARROW
    yield "groups, then rows twice, unannounced", tasks


def working_set(tasks: list[Task]) -> int:
    """Distinct prompt tokens: those of the tree of all prompts."""
    keys = sorted({sort_key(prompt): prompt for task in tasks for prompt in task.prompts}.items())
    prompts = [prompt for _, prompt in keys]
    return sum(map(len, prompts)) - sum(shared_with_next(prompts)[:-1])


def run(tasks: list[Task], pages: int, eviction: LeastRecentlyUsed) -> tuple[int, int]:
    """Prompt tokens and computed tokens of all tasks."""
    scheduler = Scheduler(
        CacheManager(pages, 1, eviction), LongestPrefixFirst(), max_batch_tokens=BATCH, max_running_rows=RUNNING
    )
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    owner: dict[int, Task] = {}
    prompt_tokens = computed = 0
    for stream, task in enumerate(tasks):
        task.stream = stream
        eviction.open(stream, task.query)
    while any(task.answered < len(task.prompts) for task in tasks):
        for task in tasks:
            for window in task.windows():
                for prompt, following in zip(window, shared_with_next(window), strict=True):
                    hints = Hints(task.stream, task.query, following, task.later_calls, task.shared)
                    scheduler.add(Request(len(owner), prompt, params, hints=hints))
                    owner[len(owner)] = task
        plan = scheduler.plan()
        if not plan.num_rows:
            continue
        for done in scheduler.commit(plan, np.full(plan.num_sampled, 7, np.int32), frozenset()):
            task = owner[done.id]
            task.answered += 1
            prompt_tokens += done.prompt_tokens
            computed += done.computed_tokens + done.recomputed_tokens
            if task.answered == len(task.prompts):
                eviction.close(task.stream)
    return prompt_tokens, computed


def measure(shares: tuple[float, ...]) -> Iterator[Result]:
    """Every load with every cache."""
    for number, (name, tasks) in enumerate(loads()):
        size = working_set(tasks)
        caches: list[tuple[float, str, LeastRecentlyUsed]] = [(1.5, "all", LeastRecentlyUsed())]
        for share in shares:
            caches += [(share, "lru", LeastRecentlyUsed()), (share, "ours", NeededLast(1))]
        for share, eviction, policy in caches:
            _, fresh = list(loads())[number]
            started = time.process_time()
            prompt_tokens, computed = run(fresh, int(size * share), policy)
            yield Result(name, share, eviction, prompt_tokens, computed, time.process_time() - started)


def report(record: dict[str, Any]) -> str:
    """A run as text, from its JSON record."""
    results = [Result(**result) for result in record["results"]]
    lines = [f"{Machine(**record['machine'])}", ""]
    lines.append(f"{'hits, % of prompt tokens':<36}  cache     lru    ours     all  computed against lru")
    by_key = {(result.load, result.share, result.eviction): result for result in results}
    for result in results:
        if result.eviction != "ours":
            continue
        lru = by_key[result.load, result.share, "lru"]
        most = next(other for other in results if other.load == result.load and other.eviction == "all")
        lines.append(
            f"{result.load:<36}  {result.share:>5.0%}  {100 * lru.hits:>6.1f}  {100 * result.hits:>6.1f}"
            f"  {100 * most.hits:>6.1f}  {result.computed_tokens / lru.computed_tokens:>20.3f}"
        )
    seconds = {name: sum(r.seconds for r in results if r.eviction == name) for name in ("lru", "ours")}
    lines.append(f"\nprocessor seconds of scheduling: lru {seconds['lru']:.1f}, ours {seconds['ours']:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    machine = asdict(this_machine())
    record = {"machine": machine, "results": [asdict(result) for result in measure(tuple(arguments.shares))]}
    print(report(record))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record))
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
