"""Ours, at three depths: ``core`` (token ids), ``service`` (text over Arrow Flight), ``spark`` (a whole SQL query)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import psutil
import pyarrow as pa
from harness import Answer, Engine, Job, run
from workload import SYSTEM, Row

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service.protocol import EngineStatus, StreamOpen, request_rows

KV_MEMORY = 2 << 30  # as the peers get


def spec(job: Job) -> EngineSpec:
    return EngineSpec(dtype=job.dtype, threads=job.threads, kv_cache_memory=KV_MEMORY)  # type: ignore[arg-type]


class Core:
    """The engine in this process: ids in, ids out."""

    def __init__(self, job: Job) -> None:
        from spark_llm.engine.loading import load_engine

        self.engine = load_engine(spec(job))
        self.sent = 0

    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        from spark_llm.engine.request import Request

        first = self.sent
        params = SamplingParams(max_tokens=max_tokens)
        for row in rows:
            self.engine.add(Request(self.sent, np.array(row.ids, dtype=np.int32), params))
            self.sent += 1
        done = {}
        while self.engine.has_work():
            done |= {completion.id: completion for completion in self.engine.step()}
        ordered = [done[first + i] for i in range(len(rows))]
        texts = self.engine.text.decode([completion.output for completion in ordered])
        return [Answer(c.output, c.cached_tokens, text) for c, text in zip(ordered, texts, strict=True)]

    def forward_seconds(self) -> float:
        return self.engine.stats().forward_seconds

    def processes(self) -> list[int]:
        return []

    def close(self) -> None:
        return None


class Service:
    """The engine process, as a task reaches it."""

    def __init__(self, job: Job) -> None:
        from spark_llm.engine.service.client import connect

        self.client = connect(spec(job))
        self.pid = self.client.status().pid

    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        texts = sorted({text for row in rows for text in (row.shared, row.own)})
        place = {text: i for i, text in enumerate(texts)}
        indices = pa.array([place[text] for row in rows for text in (row.shared, row.own)], pa.int32())
        segments = pa.ListArray.from_arrays(
            pa.array(range(0, 2 * len(rows) + 1, 2), pa.int32()), pa.DictionaryArray.from_arrays(indices, texts)
        )
        header = StreamOpen(params=SamplingParams(max_tokens=max_tokens), system=SYSTEM, instruction_segments=0)
        answers: dict[int, Answer] = {}
        with self.client.stream(header) as stream:
            stream.send(request_rows(range(len(rows)), segments))
            while (batch := stream.receive()) is not None:
                for row in batch.to_pylist():
                    if row["error"]:
                        raise RuntimeError(row["error"])
                    answers[row["id"]] = Answer(
                        None, row["cached_tokens"], row["text"], row["prompt_tokens"], row["output_tokens"]
                    )
        return [answers[i] for i in range(len(rows))]

    def forward_seconds(self) -> float:
        return self.client.status().forward_seconds

    def processes(self) -> list[int]:
        return [self.pid]

    def close(self) -> None:
        return None  # the engine ends with this process


class Spark:
    """A query over a table of the same texts; its prompts carry field names, so they are a little longer."""

    QUERY = "SELECT id, llm('Is this film worth seeing?', film, review, max_tokens => {}) AS answer FROM reviews"

    def __init__(self, job: Job) -> None:
        import spark_llm

        self.spark = spark_llm.session(
            master="local[1]",
            **{
                "engine.dtype": job.dtype,
                "engine.threads": job.threads,
                "engine.kvCacheMemory": KV_MEMORY,
                "progress": "false",
                "cache.enabled": False,
            },
        )

    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        import spark_llm

        table = [(i, row.shared, row.own) for i, row in enumerate(rows)]
        self.spark.createDataFrame(table, "id long, film string, review string").createOrReplaceTempView("reviews")
        texts = {row.id: row.answer for row in self.spark.sql(self.QUERY.format(max_tokens)).collect()}
        report = spark_llm.last_report(self.spark)
        if report is None or report.calls != len(rows) or None in texts.values():
            raise RuntimeError(f"the query did not answer its {len(rows)} rows: {report}")
        # the report counts per query; spread it so that the sums are right
        first = Answer(None, report.cached_tokens, texts[0], report.prompt_tokens, report.output_tokens)
        rest = [Answer(None, 0, texts[i], 0, 0) for i in range(1, len(rows))]
        return [first, *rest]

    def engine(self) -> EngineStatus:
        """The engine of this Spark: the one whose owner is below this process."""
        from spark_llm.engine.service.client import list_engines

        below = {process.pid for process in psutil.Process().children(recursive=True)}
        for _ in range(10):  # a busy engine may be too slow to be listed at once
            for engine in list_engines():
                if engine.owner in below:
                    return engine
        raise RuntimeError("no engine of this Spark answers")

    def forward_seconds(self) -> float:
        return self.engine().forward_seconds

    def processes(self) -> list[int]:
        return [self.engine().pid]

    def close(self) -> None:
        self.spark.stop()


def load(job: Job) -> Engine:
    return {"core": Core, "service": Service, "spark": Spark}[job.variant](job)


if __name__ == "__main__":
    run(load, "spark-llm")
