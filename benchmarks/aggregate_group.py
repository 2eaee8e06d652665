"""One group of a million texts: what `ai_agg` over it takes in calls, levels, memory and time.

    .venv/bin/python benchmarks/aggregate_group.py                    a million texts, answers made up (FakeAnswers)
    .venv/bin/python benchmarks/aggregate_group.py --model            2,000 texts, the packaged model answers
    .venv/bin/python benchmarks/aggregate_group.py --rows 10000000 --heap 1g

The texts are the packaged sentences of product reviews, repeated with a number, so that no two are equal; they are read
from a Parquet table whose size is all that Spark knows. The plan, the tasks, the service and the counting are the real
ones; without --model a function stands for the model alone, in this process: calls and memory are exact, seconds are
those of Spark and of sending texts, not of answering. Memory is sampled (RSS of the JVM; of its Python workers
together PSS, in which pages that they share count once); this process, which is the driver's Python and has the fake
service, and the real engine's process are no part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil
from call_count_engine import fake_counting_engine
from cpu_engine import revision
from machine import Machine, this_machine

import spark_llm
from spark_llm import datasets

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "aggregate_group.json"
INSTRUCTION = "What do customers complain about?"
ANSWER_CHARACTERS = 300  # of an answer that is made up: as long as one of 100 tokens
EVERY = 0.1  # seconds between two looks at the memory


class FakeAnswers:
    """In place of the model: an answer that hangs on every letter of its prompt, and says its level.

    calls: by level, 0 is about texts. texts: how many were shown. longest: characters of a prompt.
    """

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.texts = 0
        self.longest = 0

    def __call__(self, prompt: str) -> str:
        below = [int(level) for level in re.findall(r"\(level (\d+)\)", prompt)]
        level = max(below) + 1 if below else 0
        self.calls[level] += 1
        self.texts += 0 if below else prompt.count('","') + 1
        self.longest = max(self.longest, len(prompt))
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        return f"(level {level}) {digest * (ANSWER_CHARACTERS // len(digest))}"


class Memory:
    """The largest in bytes, sampled: RSS of the JVM, PSS of its Python workers together, both at one time."""

    def __init__(self) -> None:
        self.jvm = self.workers = self.both = 0
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Memory]:
        """Sample until the end of the block."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            jvm = workers = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name() == "java":
                        jvm += process.memory_info().rss
                    elif "pyspark" in " ".join(process.cmdline()):
                        workers += process.memory_full_info().pss
            self.jvm = max(self.jvm, jvm)
            self.workers = max(self.workers, workers)
            self.both = max(self.both, jvm + workers)


@dataclass(frozen=True)
class Group:
    """One run. calls: by level, of which 0 is about texts; the model's by prompt. seconds: of the query. idle: MiB of
    JVM and workers before it; the rest: at most."""

    answers: str
    rows: int
    text_mib: float
    table_mib: float
    heap: str
    levels_planned: int
    calls: dict[str, int]
    seconds: float
    idle_mib: float
    jvm_mib: float
    workers_mib: float
    both_mib: float
    answer: str


def make_table(spark: SparkSession, rows: int, folder: str) -> float:
    """The table ``texts`` with so many different ones in one group; MiB of its files."""
    sentences = datasets.load("products")["review_sentences"]["sentence"]
    frame = pd.DataFrame({"n": range(len(sentences)), "sentence": sentences})
    spark.createDataFrame(frame).createOrReplaceTempView("sentences")
    made = spark.sql(
        f"SELECT /*+ BROADCAST(sentences) */ concat(sentence, ' #', id) AS text "
        f"FROM range({rows}) JOIN sentences ON n = id % {len(sentences)}"
    )
    made.write.parquet(folder, mode="overwrite")
    spark.read.parquet(folder).createOrReplaceTempView("texts")
    return sum(file.stat().st_size for file in Path(folder).rglob("*.parquet")) / 2**20


def measure(rows: int, heap: str, by_model: bool, slots: int) -> Group:
    """Ask about ``rows`` texts as one group, in a JVM of ``heap``."""
    spark = spark_llm.session(
        f"local[{slots}]",
        progress="false",
        cache_enabled=False,
        conf={"spark.ui.enabled": "false", "spark.driver.memory": heap, "spark.log.level": "ERROR"},
    )
    fake = FakeAnswers()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            table_mib = make_table(spark, rows, folder)
            [size] = spark.sql("SELECT sum(octet_length(text)) / 1048576 FROM texts").first() or [0]
            if not by_model:
                stack.enter_context(fake_counting_engine(spark, fake))
            query = spark.sql(f"SELECT ai_agg(text, '{INSTRUCTION}') AS answer, count(*) AS rows FROM texts")
            levels = query._jdf.queryExecution().optimizedPlan().toString().count("ArrowEvalPython") - 1
            with Memory().watched() as idle:
                time.sleep(5 * EVERY)
            memory = Memory()
            start = time.perf_counter()
            with memory.watched():
                row = query.first()
            seconds = time.perf_counter() - start
            assert row is not None
            assert row.rows == rows
            if by_model:
                report = spark_llm.last_report(spark)
                calls = {name.partition("\n")[2][:40]: part.calls for name, part in report.by_call.items()}
            else:
                calls = {f"level {level}": count for level, count in sorted(fake.calls.items())}
                assert fake.texts == rows, f"{fake.texts} of {rows} texts were shown"
    finally:
        spark.stop()
    return Group(
        answers="the packaged model" if by_model else "made up (FakeAnswers)",
        rows=rows, text_mib=float(size), table_mib=table_mib, heap=heap, levels_planned=levels, calls=calls,
        seconds=seconds, idle_mib=idle.both / 2**20, jvm_mib=memory.jvm / 2**20, workers_mib=memory.workers / 2**20,
        both_mib=memory.both / 2**20, answer=row.answer,
    )  # fmt: skip


def report(record: dict[str, Any]) -> str:
    """A run as text, from its JSON record."""
    group = record["group"]
    calls = "; ".join(f"{name}: {count:,}" for name, count in group["calls"].items())
    return "\n".join(
        [
            f"{Machine(**record['machine'])}; revision {record['revision']}",
            f"answers: {group['answers']}",
            f"one group of {group['rows']:,} texts, {group['text_mib']:,.0f} MiB ({group['table_mib']:,.0f} in files)",
            f"calls: {calls} ({group['levels_planned']} levels of answers planned)",
            f"{group['seconds']:,.1f} s",
            f"most memory: JVM {group['jvm_mib']:,.0f} MiB (heap of {group['heap']}), Python workers "
            f"{group['workers_mib']:,.0f} MiB, both at one time {group['both_mib']:,.0f} MiB; "
            f"before the query {group['idle_mib']:,.0f} MiB",
            f"answer: {group['answer'][:200]}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="a million, with --model 2,000")
    parser.add_argument("--heap", default="1g")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    machine = asdict(this_machine())
    rows = arguments.rows or (2_000 if arguments.model else 1_000_000)
    group = measure(rows, arguments.heap, arguments.model, arguments.slots)
    record = {"machine": machine, "revision": revision(), "group": asdict(group)}
    print(report(record))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
