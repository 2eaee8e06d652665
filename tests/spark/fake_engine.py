"""An engine for tests of the UDF that need Spark but no model: it lives in the Python worker.

The answer of a row is its user message; messages with ``fail`` in them fail, with ``never`` are never answered.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

from spark_llm.engine.service.protocol import ANSWER_SCHEMA, StreamOpen


def answers(texts: Iterable[tuple[int, str]], answer: Callable[[str], str] = str) -> pa.RecordBatch:
    """What the engine sends back for (id, message) pairs."""
    rows = []
    for number, text in texts:
        fails = "fail" in text
        rows.append(
            {
                "id": number,
                "text": None if fails else answer(text),
                "finish_reason": "error" if fails else "stop",
                "error": "[LLM_FAKE] this row fails SQLSTATE: 22000" if fails else None,
                "prompt_tokens": len(text),
                "instruction_tokens": 2,
                "cached_tokens": 5,
                "cached_instruction_tokens": 1,
                "computed_tokens": len(text) - 5,
                "recomputed_tokens": 0,
                "output_tokens": 3,
                "folded": False,
                "stored": False,
            }
        )
    return pa.RecordBatch.from_pylist(rows, ANSWER_SCHEMA)


class FakeStream:
    """Answers the newest request first, one at a time."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, str]] = deque()

    def send(self, batch: pa.RecordBatch) -> None:
        for number, segments in zip(batch["id"].to_pylist(), batch["segments"].to_pylist(), strict=True):
            self.waiting.append((number, "".join(segments)))

    def receive(self) -> pa.RecordBatch:
        while self.waiting and "never" in self.waiting[-1][1]:
            self.waiting.pop()
        if not self.waiting:
            threading.Event().wait()
        return answers([self.waiting.pop()])

    def close(self) -> None:
        self.waiting.clear()


class FakeClient:
    """Opens FakeStreams."""

    def stream(self, header: StreamOpen) -> FakeStream:
        assert header.query
        return FakeStream()


def fake_udf(
    sink: Any,
    tables: Mapping[str, bytes] | None = None,
    make_client: Callable[[], Any] = FakeClient,
    calls: int = 0,
) -> Any:
    """The real UDF with a fake client in place of the engine's; the rest as in ``udf.make_udf``."""
    from spark_llm.udf import pandas_function

    known = dict(tables or {})

    def llm(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[Any]:
        from spark_llm import udf

        real = udf.client.connect
        udf.client.connect = lambda spec, start_timeout=0.0: make_client()  # type: ignore[assignment,return-value]
        try:
            yield from (udf.answer_group if calls else udf.answer_task)(batches, sink, known)
        finally:
            udf.client.connect = real  # Spark uses a worker again, also for tests with the real engine

    return pandas_function(llm, calls)
