"""A fake engine that counts: the real service over a model of a few lines, in this process.

Tasks reach it as they reach a real one, by Arrow Flight on a Unix socket, and what folds rows, keeps answers, grants
windows and stops streams is the service's own code. Only text and model are fakes: tokens are bytes, and a Python
function answers a prompt. So calls are exact, and seconds say nothing.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.request import Completion, FinishReason, Request, TokenIds
from spark_llm.engine.service import client
from spark_llm.engine.service.client import EngineClient
from spark_llm.engine.service.probe import connection
from spark_llm.engine.service.protocol import StreamOpen

if TYPE_CHECKING:
    import pyarrow.flight as flight
    from pyspark.sql import SparkSession

Answer = Callable[[str], str]

STEP_ROWS = 16  # answered together: few, so that a stop finds rows that still wait


class FakeText:
    """Tokens are the UTF-8 bytes of a row's message."""

    def encode_rows(
        self, header: StreamOpen, batch: pa.RecordBatch
    ) -> tuple[list[TokenIds], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rows = batch.column("segments").to_pylist()
        ids = [np.frombuffer("".join(row).encode(), np.uint8).astype(np.int32) for row in rows]
        starts = [
            ["".join(row[:count]).encode() for row in rows]
            for count in (header.instruction_segments, header.shared_segments)
        ]
        return ids, *(np.array([len(start) for start in row], np.int64) for row in starts)

    def decode(self, outputs: list[list[int]], stop: tuple[str, ...]) -> list[str]:
        return [bytes(output).decode() for output in outputs]

    def stop_checker(self, stop: tuple[str, ...]) -> None:
        return None


@dataclass
class FakeStats:
    tokens: int = 0
    waiting: int = 0
    running: int = 0
    free_pages: int = 1
    total_pages: int = 1
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0


@dataclass
class FakeConfig:
    name: str = "fake"


class FakeCountingEngine:
    """Answers prompts by ``answer``; ``prompts`` are those of all calls since ``forget``, in their order."""

    def __init__(self, answer: Answer) -> None:
        self.text = FakeText()
        self.dtype = "none"
        self.model_config = FakeConfig()
        self.prompts: list[str] = []
        self._answer = answer
        self._waiting: dict[int, Request] = {}

    @property
    def calls(self) -> int:
        """Rows answered; those that were cancelled before do not count."""
        return len(self.prompts)

    def forget(self) -> None:
        self.prompts = []

    def open(self, stream: int, query: str) -> None:
        return None

    def close(self, stream: int) -> None:
        return None

    def add(self, request: Request) -> None:
        self._waiting[request.id] = request

    def cancel(self, ids: Iterable[int]) -> None:
        for request_id in ids:
            del self._waiting[request_id]

    def clients(self) -> dict[str, Any]:
        return {}

    def has_work(self) -> bool:
        return bool(self._waiting)

    def step(self) -> list[Completion]:
        return [self._complete(self._waiting.pop(request_id)) for request_id in [*self._waiting][:STEP_ROWS]]

    def stats(self) -> FakeStats:
        return FakeStats(waiting=len(self._waiting))

    def _complete(self, request: Request) -> Completion:
        prompt = bytes(request.prompt.astype(np.uint8)).decode()
        self.prompts.append(prompt)
        output = list(self._answer(prompt).encode())
        tokens = len(request.prompt)
        return Completion(
            request.id,
            output,
            FinishReason.STOP,
            prompt_tokens=tokens,
            cached_tokens=0,
            computed_tokens=tokens,
            instruction_tokens=request.instruction_tokens,
        )


class FakeRouteClient(EngineClient):
    """In a task: the client of the fake's socket, whatever engine the session asks for."""

    def __init__(self, socket: str) -> None:
        super().__init__(EngineSpec(), 60.0)
        self._socket = socket
        self._connection: flight.FlightClient | None = None

    def channel(self) -> flight.FlightClient:
        if self._connection is None:
            self._connection = connection(self._socket)
        return self._connection

    def reconnect(self) -> flight.FlightClient:
        return self.channel()


@contextlib.contextmanager
def fake_counting_engine(spark: SparkSession, answer: Answer) -> Iterator[FakeCountingEngine]:
    """Let the llm() calls of the session's application reach a fake that answers prompts by ``answer``."""
    from pyspark import cloudpickle
    from pyspark.sql.functions import pandas_udf

    from spark_llm import report, udf
    from spark_llm.engine.service.loop import EngineLoop
    from spark_llm.engine.service.server import EngineServer
    from spark_llm.functions.registry import Registry

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this module
    reports = report.install(spark)

    with tempfile.TemporaryDirectory(prefix="calls") as folder:
        socket = str(Path(folder) / "s")

        def make(tables: Mapping[str, bytes], calls: int) -> Any:
            real = udf.make_udf(reports, tables, calls)
            answer_task = real.func

            def llm(batches: Iterator[Any]) -> Iterator[Any]:
                connect = client.connect
                client.connect = lambda spec, start_timeout=0.0: FakeRouteClient(socket)
                try:
                    yield from answer_task(batches)
                finally:
                    client.connect = connect  # Spark uses a worker again

            llm.__annotations__ = answer_task.__annotations__
            return pandas_udf(llm, real.returnType)

        engine = FakeCountingEngine(answer)
        failures: list[BaseException] = []

        def on_fatal(error: BaseException) -> None:
            failures.append(error)
            threading.Thread(target=server.shutdown).start()  # else tasks would wait for ever

        loop = EngineLoop(engine, on_fatal)  # type: ignore[arg-type]
        server = EngineServer(socket, loop, engine.text, 1, threading.Event().set)  # type: ignore[arg-type]
        loop.start()
        with server, Registry.of(spark).using(spark, make):
            yield engine
        if failures:
            raise failures[0]


def parts(prompt: str) -> tuple[str, dict[str, str]]:
    """A prompt's instruction, and its fields by name, in whichever order they stand."""
    lines = [line for line in prompt.split("\n") if line]
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    return " ".join(line for line in lines if ": " not in line), fields


def fake_sums(prompt: str) -> str:
    """The model of the query shapes: ``sum mod N`` adds all numbers in the fields, ``echo`` repeats the fields."""
    instruction, fields = parts(prompt)
    values = sorted(fields.values())
    numbers = [int(number) for value in values for number in re.findall(r"\d+", value)]
    what, _, modulus = instruction.rpartition(" ")
    if what.endswith("sum mod"):
        return str(sum(numbers) % int(modulus))
    if instruction.startswith("json"):
        return f'{{"a": "{sum(numbers)}", "b": "{" ".join(values)}"}}'
    return " ".join(values)
