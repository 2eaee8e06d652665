"""What the service needs of whoever computes: the built-in engine, or a server elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from spark_llm.engine.constraints.matcher import CompiledConstraint
from spark_llm.engine.request import Completion, Constraint, Request, TokenIds
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.batch import Ints

if TYPE_CHECKING:
    from spark_llm.engine.core import EngineStats
    from spark_llm.engine.scheduling.accounts import Service


class Named(Protocol):
    """A model's description, of which the service tells the name."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model of which nothing else is known."""

    name: str


class ServedEngine(Protocol):
    """Answers rows; see engine.core.Engine. One thread calls it, which sleeps while there is no work."""

    dtype: str

    @property
    def model_config(self) -> Named: ...

    def open(self, stream: int, query: str) -> None: ...

    def close(self, stream: int) -> None: ...

    def add(self, request: Request) -> None: ...

    def cancel(self, ids: Iterable[int]) -> None: ...

    def watch_evictions(self, evicted: Callable[[bytes, int, int], None]) -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[Completion]: ...

    def stats(self) -> EngineStats: ...

    def clients(self) -> Mapping[str, Service]: ...


class ServedText(Protocol):
    """Makes prompts of rows, and texts of answers; see engine.text.pipeline.TextPipeline."""

    def encode_rows(self, header: StreamOpen, batch: pa.RecordBatch) -> tuple[list[TokenIds], Ints, Ints]: ...

    def decode(self, outputs: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> list[str]: ...

    def stop_checker(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None: ...

    def constrain(self, system: str | None, constraint: Constraint) -> CompiledConstraint: ...
