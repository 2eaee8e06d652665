"""A counting model for tests: the real UDF asks it, it answers with a hash of the exact prompt and writes calls down.

Each stream, which is a task's evaluation of a call, has a file of its own with its requests in their order. It folds
nothing: the engine's folding of equal requests of a query is counted afterwards (``FakeModel.engine_calls``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from fake_engine import FakeStream, answers, fake_udf
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import report
from spark_llm.engine.service.protocol import StreamOpen
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

    @property
    def prompt(self) -> str:
        return "".join(self.segments)

    @property
    def exact(self) -> tuple[object, ...]:
        """All that the answer depends on."""
        return self.frame, self.seed, self.prompt

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """The fields of the message, name and value, without the instruction. A name has no ``: ``."""
        fields = self.segments[1:] if self.instruction_segments else self.segments[:-1]
        return tuple(tuple(field.removesuffix("\n").split(": ", 1)) for field in fields)  # type: ignore[misc]


class FakeModel:
    """``spark``: a session whose llm() asks this model."""

    def __init__(self, spark: SparkSession, folder: Path) -> None:
        self.spark = spark
        self._folder = folder

    def requests(self) -> list[Request]:
        """All calls since ``forget``; those of a stream stand together, in their order."""
        lines = [line for file in sorted(self._folder.iterdir()) for line in file.read_text("utf-8").splitlines()]
        return [Request(**{**(row := json.loads(line)), "segments": tuple(row["segments"])}) for line in lines]

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


class FakeCountingStream(FakeStream):
    """Answers all that waits, the newest first, with hashes."""

    def __init__(self, header: StreamOpen, folder: str, reads_order: bool) -> None:
        super().__init__()
        self._reads_order = reads_order
        self._header = header
        self._name = uuid.uuid4().hex
        self._file = Path(folder) / self._name
        self._frame = json.dumps([header.system, repr(header.params)])

    def send(self, batch: pa.RecordBatch) -> None:
        columns = [batch[name].to_pylist() for name in ("id", "segments", "seed", "key")]
        with self._file.open("a", encoding="utf-8") as file:
            for number, segments, seed, key in zip(*columns, strict=True):
                row = {
                    "stream": self._name,
                    "query": self._header.query,
                    "frame": self._frame,
                    "segments": segments,
                    "seed": seed,
                    "key": None if key is None else key.hex(),
                    "instruction_segments": self._header.instruction_segments,
                    "later_calls": self._header.later_calls,
                }
                file.write(json.dumps(row) + "\n")
                # The seed of a row depends on the order policy, too.
                read = [seed, "".join(segments)] if self._reads_order else sorted(segments)
                self.waiting.append((number, json.dumps(read)))

    def receive(self) -> pa.RecordBatch:
        assert self.waiting
        found = [self.waiting.pop() for _ in range(len(self.waiting))]
        return answers(found, lambda text: hashlib.blake2b((self._frame + text).encode(), digest_size=8).hexdigest())


class FakeCountingClient:
    def __init__(self, folder: str, reads_order: bool) -> None:
        self._folder = folder
        self._reads_order = reads_order

    def stream(self, header: StreamOpen) -> FakeCountingStream:
        assert header.query
        return FakeCountingStream(header, self._folder, self._reads_order)


def fake_counting_udf(sink: Any, tables: Mapping[str, bytes], calls: int, folder: str, reads_order: bool) -> Any:
    """The real UDF over this model, which writes its calls into ``folder``.

    reads_order: answers depend on the seed and on the order of a prompt's lines; else only on which ones there are.
    """
    return fake_udf(sink, tables, lambda: FakeCountingClient(folder, reads_order), calls)


@contextlib.contextmanager
def fake_model(spark: SparkSession, folder: Path, reads_order: bool) -> Iterator[FakeModel]:
    """A fresh session whose llm() asks this model."""
    sink = report.install(spark).sink
    make = functools.partial(fake_counting_udf, sink, folder=str(folder), reads_order=reads_order)
    with Registry.of(spark).using(spark, make):
        yield FakeModel(spark_llm.enable(spark.newSession()), folder)
