"""A counting model for tests: the real UDF asks it, it answers with a hash of the exact prompt and writes calls down.

Each stream, which is a task's evaluation of a call, has a file of its own with its requests in their order. It folds
nothing and stores nothing: the engine's folding of equal requests of a query is counted afterwards
(``FakeModel.engine_calls``). Windows under a limit are granted by the engine's own rule, over all tasks; streams are
not stopped, as its answers are there at once. Budgets count calls only. Messages with ``fail`` in them fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
from fake_engine import FakeStream, answers, fake_udf
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import report
from spark_llm.engine.service.limits import Limits
from spark_llm.engine.service.protocol import ANSWER_SCHEMA, StreamOpen, WindowRequest
from spark_llm.errors import LlmError
from spark_llm.functions.registry import Registry


@dataclass(frozen=True)
class Request:
    """One call: ``segments`` of its message, ``frame``: what else the model sees, ``key``: of equal arguments."""

    stream: str
    query: str
    frame: str
    segments: tuple[str, ...]
    seed: int | None
    key: str | None
    instruction_segments: int
    later_calls: int
    node: str = ""
    limit: int = 0
    constraint: dict[str, Any] | None = None
    choices: tuple[str, ...] | None = None

    @property
    def prompt(self) -> str:
        return "".join(self.segments)

    @property
    def exact(self) -> tuple[object, ...]:
        """All that the answer depends on."""
        return self.frame, self.seed, self.prompt

    @property
    def pairs(self) -> tuple[tuple[str, ...], ...]:
        """The segments of each pair that the message asks about, as those of a prompt of its own."""
        return pairs_of(self.segments)

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """The fields of the message, name and value, without the instruction. A name has no ``: ``."""
        fields = self.segments[1:] if self.instruction_segments else self.segments[:-1]
        return tuple(tuple(field.removesuffix("\n").split(": ", 1)) for field in fields)  # type: ignore[misc]


def pairs_of(segments: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A prompt of several rows (spark_llm.shared_prompt) -> a prompt for each; a prompt of one row is itself."""
    rows = [place for place, segment in enumerate(segments) if re.match(r"\d+\. ", segment)]
    if not rows or not segments[-1].startswith("Answer for each of the "):
        return (tuple(segments),)
    before, behind = segments[: rows[0]], segments[rows[-1] + 1 : -1]
    lines = [segments[place].split(". ", 1)[1].splitlines(keepends=True) for place in rows]
    return tuple((*before, *each, *behind) for each in lines)


def numbered(answers: Sequence[str]) -> str:
    """The answer about several rows, as it should be."""
    return "\n".join(f"{number}: {answer}" for number, answer in enumerate(answers, 1))


class FakeModel:
    """``spark``: a session whose llm() asks this model."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.spark = spark
        self._folder = folder

    def requests(self) -> list[Request]:
        """All calls since ``forget``; those of a stream stand together, in their order."""
        files = sorted(file for file in self._folder.iterdir() if not file.name.startswith("."))
        lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
        found = [json.loads(line) for line in lines]
        for row in found:
            row["segments"] = tuple(row["segments"])
            row["choices"] = None if row["choices"] is None else tuple(row["choices"])
        return [Request(**row) for row in found]

    def streams(self) -> list[list[Request]]:
        """The calls of each stream."""
        found: dict[str, list[Request]] = {}
        for request in self.requests():
            found.setdefault(request.stream, []).append(request)
        return list(found.values())

    def engine_calls(self) -> int:
        """How many of the requests an engine computes, which answers equal keys of a query once."""
        found = self.requests()
        return len({(r.query, r.key) for r in found if r.key is not None}) + sum(r.key is None for r in found)

    def forget(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()


OVER_BUDGET = str(LlmError("LLM_BUDGET_EXCEEDED", key="spark.llm.budget.maxCalls", limit="this", spent="all of it"))

Answer = Sequence[str] | Callable[[str], str]
Tell = Callable[[Sequence[str]], str]


class Shared:
    """Lists of JSON values that the streams of all tasks add to, one file each."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def add(self, name: str, value: object) -> list[Any]:
        """The list with ``value`` at its end, unless it was there."""
        with (self._folder / f".{hashlib.sha1(name.encode()).hexdigest()}").open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            found: list[Any] = [json.loads(line) for line in file]
            if value not in found:
                file.write(json.dumps(value) + "\n")
                found.append(value)
            return found


class FakeCountingStream(FakeStream):
    """Answers all that waits, the newest first."""

    def __init__(self, header: StreamOpen, folder: str, reads_order: bool, answers: Answer, tell: Tell) -> None:
        super().__init__()
        self._tell = tell
        self._reads_order = reads_order
        self._answers = answers
        self._header = header
        self._name = uuid.uuid4().hex
        self._file = Path(folder) / self._name
        self._shared = Shared(folder)
        self._frame = json.dumps([header.system, repr(header.params)])
        self._texts: dict[int, str | None] = {}

    def send(self, batch: pa.RecordBatch) -> None:
        columns = [batch[name].to_pylist() for name in ("id", "segments", "seed", "key", "choices")]
        header = self._header
        with self._file.open("a", encoding="utf-8") as file:
            for number, segments, seed, key, choices in zip(*columns, strict=True):
                row = {
                    "stream": self._name,
                    "query": header.query,
                    "frame": self._frame,
                    "segments": segments,
                    "seed": seed,
                    "key": None if key is None else key.hex(),
                    "instruction_segments": header.instruction_segments,
                    "later_calls": header.later_calls,
                    "node": header.node,
                    "limit": header.limit,
                    "constraint": None if header.constraint is None else msgspec.to_builtins(header.constraint),
                    "choices": choices,
                }
                # The seed of a row depends on the order policy, too.
                read = json.dumps([seed, "".join(segments)] if self._reads_order else sorted(segments))
                self.waiting.append((number, read))
                if self._is_paid(row["key"] or f"{self._name}-{number}"):
                    file.write(json.dumps(row) + "\n")
                    self._texts[number] = self._about(segments, read)

    def receive(self) -> pa.RecordBatch:
        assert self.waiting
        found = [self.waiting.pop() for _ in range(len(self.waiting))]
        rows = answers(found).to_pylist()
        for row in rows:
            text = self._texts.pop(row["id"], None)
            if text is None:
                row |= {
                    "text": None,
                    "error": OVER_BUDGET,
                    "prompt_tokens": 0,
                    "computed_tokens": 0,
                    "cached_tokens": 0,
                }
            elif row["error"] is None:
                row["text"] = text
        return pa.RecordBatch.from_pylist(rows, ANSWER_SCHEMA)

    def _is_paid(self, call: str) -> bool:
        budget = self._header.budget
        if budget is None or not budget.calls:
            return True
        return call in self._shared.add(f"budget {self._header.query}", call)[: budget.calls]

    def _about(self, segments: Sequence[str], read: str) -> str:
        pairs = pairs_of(segments)
        if len(pairs) == 1:
            return self._answer("".join(segments), read)
        return self._tell([self._answer("".join(pair), json.dumps(sorted(pair))) for pair in pairs])

    def _answer(self, message: str, read: str) -> str:
        if callable(self._answers):
            return self._answers(message)
        digest = hashlib.blake2b((self._frame + read).encode(), digest_size=8).hexdigest()
        return self._answers[int(digest, 16) % len(self._answers)] if self._answers else digest


class FakeCountingClient:
    def __init__(self, folder: str, reads_order: bool, answers: Answer, tell: Tell) -> None:
        self._folder = folder
        self._reads_order = reads_order
        self._answers = answers
        self._tell = tell

    def stream(self, header: StreamOpen) -> FakeCountingStream:
        assert header.query
        return FakeCountingStream(header, self._folder, self._reads_order, self._answers, self._tell)

    def window(self, request: WindowRequest) -> int:
        """What the engine would grant, which has heard of all requests so far."""
        name = f"windows {request.query} {request.node}"
        limits = Limits()
        told = Shared(self._folder).add(name, msgspec.to_builtins(request))
        grants = [limits.grant(msgspec.convert(past, WindowRequest)) for past in told]
        return grants[told.index(msgspec.to_builtins(request))]


def fake_counting_udf(
    sink: Any, tables: Mapping[str, bytes], calls: int, folder: str, reads_order: bool, answers: Answer, tell: Tell
) -> Any:
    """The real UDF over this model, which writes its calls into ``folder``."""
    return fake_udf(sink, tables, lambda: FakeCountingClient(folder, reads_order, answers, tell), calls)


@contextlib.contextmanager
def fake_model(
    spark: SparkSession, folder: Path, reads_order: bool, answers: Answer = (), tell: Tell = numbered
) -> Iterator[FakeModel]:
    """A fresh session whose llm() asks this model.

    It answers with hashes. reads_order: they depend on the seed and on the order of a prompt's lines; else only on
    which lines there are. answers: the texts that the hash chooses from, for example ``("yes", "no")``; or the function
    from a message (prompt and fields, as the model sees them) to its answer: one made inside the test, so that tasks
    get it by value, like ``lambda message: "yes" if "id: 7" in message else "no"``. tell: what it makes of its answers
    about the rows of one prompt, each of which it answers as if it stood alone.
    """
    sink = report.install(spark).sink
    make = functools.partial(
        fake_counting_udf, sink, folder=str(folder), reads_order=reads_order, answers=answers, tell=tell
    )
    with Registry.of(spark).using(spark, make):
        yield FakeModel(spark_llm.enable(spark.newSession()), folder)
