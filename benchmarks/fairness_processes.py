"""The router against its baselines on real engine processes: the demo model on CPU threads, reached as tasks reach it.

Each engine is a process of its own with a cache too small for all prefixes. Texts differ from policy to policy, so that
none finds what another left. With more engines than cores all are slower alike: compare the lines of one size.
"""

from __future__ import annotations

import argparse
import queue
import random
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from fairness_cost import fitted
from fairness_report import number, origin, table
from fairness_routing import POLICIES
from workload import sentence

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service.client import connect
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, StreamOpen
from spark_llm.engine.service.routing import PrefixGroup, Router, path_of
from spark_llm.engine.service.routing.group import OUTPUT_WEIGHT

ENGINES = (2, 4)
QUERIES, ROWS, WINDOW, GROUP = 2, 48, 24, 8  # queries for each engine; rows of a query, under way, under one prefix
PREFIXES, PREFIX_SENTENCES = 8, 9  # of two queries; a sentence has about 15 tokens
TOKENS_A_WORD = 1.1
OUTPUT = 4
KV_MEMORY = 80 << 20  # of an engine: about 1,800 tokens
QUANTUM = 2_048  # two steps


@dataclass
class Case:
    """One policy on one number of engines. Rates by wall time; jain: of service up to when the first query ended."""

    engines: int
    policy: str
    rows: int
    seconds: float
    hit_rate: float
    jain: float
    late: float


class Query:
    """Rows under prefixes in the order in which they come; the second of two reads the same table as the first."""

    def __init__(self, number: int, rows: int, label: str) -> None:
        self.name = f"q{number}"
        rng = random.Random(number // 2)  # the same texts under each policy; the label makes them new to the engines
        prefixes = ["".join(sentence(rng) for _ in range(PREFIX_SENTENCES)) for _ in range(PREFIXES)]
        own = random.Random(f"{number} own")
        self.groups: deque[list[tuple[str, str]]] = deque()
        for start in range(0, rows, GROUP):
            shared = f"{label} {number // 2}:" + own.choice(prefixes)
            self.groups.append([(shared, f" {row}:{sentence(own)}") for row in range(start, min(rows, start + GROUP))])
        self.under_way = self.service = 0.0
        self.left = rows
        self.ended = 0.0


class Run:
    """Queries over the engines of one router, to their end."""

    def __init__(self, policy: str, engines: int, rows: int, threads: int) -> None:
        self.router = Router(policy, QUANTUM)
        label = f"{policy} {engines} {time.time():.0f}"
        self.queries = [Query(number, rows, label) for number in range(QUERIES * engines)]
        self.answers: queue.Queue[tuple[int, pa.RecordBatch | Exception]] = queue.Queue()
        self.streams: dict[tuple[str, int], Any] = {}
        self.sends: dict[tuple[str, int], threading.Event] = {}  # something was sent on the stream
        self.closed = False
        self.share_of: dict[int, int] = {}
        self.sent = 0
        for engine in range(engines):
            # an engine process is one of its spec: the specs differ in what nobody waits for
            spec = EngineSpec(dtype="float32", threads=threads, kv_cache_memory=KV_MEMORY, idle_timeout=300.0 + engine)
            client, name = connect(spec), f"e{engine}"
            self.router.engine_added(name)
            for at, query in enumerate(self.queries):
                header = StreamOpen(
                    query=f"{label} {at}",
                    client=query.name,
                    params=SamplingParams(max_tokens=OUTPUT, ignore_eos=True),
                    instruction_segments=0,
                )
                stream = self.streams[name, at] = client.stream(header)
                self.sends[name, at] = threading.Event()
                threading.Thread(target=self._receive, args=(name, at, stream), daemon=True).start()

    def __call__(self) -> Case:
        started = time.perf_counter()
        prompt = cached = 0
        first: list[float] = []
        for at in range(len(self.queries)):
            self._fill(at)
        while any(query.left for query in self.queries):
            at, batch = self.answers.get(timeout=300)
            if isinstance(batch, Exception):
                raise batch
            query = self.queries[at]
            for row in batch.to_pylist():
                if row["error"]:
                    raise RuntimeError(row["error"])
                prompt += row["prompt_tokens"]
                cached += row["cached_tokens"]
                query.service += row["computed_tokens"] + OUTPUT_WEIGHT * row["output_tokens"]
                query.under_way -= 1
                query.left -= 1
                self.router.finished(self.share_of.pop(row["id"]), 1, row["computed_tokens"], row["output_tokens"])
            if not query.left:
                query.ended = time.perf_counter() - started
                first = first or [query.service for query in self.queries]
            self._fill(at)
        seconds = time.perf_counter() - started
        self.closed = True
        for key, stream in self.streams.items():
            stream.close()
            self.sends[key].set()
        ends = sorted(query.ended for query in self.queries)
        return Case(
            engines=len(self.router.engines),
            policy="",
            rows=self.sent,
            seconds=seconds,
            hit_rate=cached / prompt,
            jain=sum(first) ** 2 / (len(first) * sum(given**2 for given in first)),
            late=ends[-1] / ends[len(ends) // 2],
        )

    def _receive(self, engine: str, at: int, stream: Any) -> None:
        """Hand over what the stream brings, until it is closed."""
        sent = self.sends[engine, at]
        try:
            while not self.closed:
                sent.wait()  # where nothing is open there is nothing to receive
                sent.clear()
                while (batch := stream.receive()) is not None:
                    self.answers.put((at, batch))
        except Exception as error:
            self.answers.put((at, error))

    def _fill(self, at: int) -> None:
        query = self.queries[at]
        while query.groups and query.under_way < WINDOW:
            rows = query.groups.popleft()
            shared, own = rows[0]
            group = PrefixGroup(
                client=query.name,
                path=path_of([shared], [round(TOKENS_A_WORD * len(shared.split()))]),
                rows=len(rows),
                own_tokens=TOKENS_A_WORD * len(own.split()),
                output_tokens=OUTPUT,
            )
            query.under_way += len(rows)
            for share in self.router.dispatch(group):
                part, rows = rows[: share.group.rows], rows[share.group.rows :]
                self._send(share.engine, at, share.id, part)

    def _send(self, engine: str, at: int, share: int, rows: list[tuple[str, str]]) -> None:
        ids = list(range(self.sent, self.sent + len(rows)))
        self.sent += len(rows)
        self.share_of |= dict.fromkeys(ids, share)
        texts = [rows[0][0], *(own for _, own in rows)]
        indices = pa.array([place for row in range(len(rows)) for place in (0, row + 1)], pa.int32())
        offsets = pa.array(range(0, 2 * len(rows) + 1, 2), pa.int32())
        segments = pa.ListArray.from_arrays(offsets, pa.DictionaryArray.from_arrays(indices, texts))
        given = {"id": pa.array(ids, pa.int64()), "segments": segments}
        columns = [given.get(field.name, pa.nulls(len(rows), field.type)) for field in REQUEST_SCHEMA]
        self.streams[engine, at].send(pa.RecordBatch.from_arrays(columns, schema=REQUEST_SCHEMA))
        self.sends[engine, at].set()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cases = []
    for engines in arguments.engines or ENGINES:
        Run("roundRobin", engines, GROUP, arguments.threads)()  # warms them up
        for policy in POLICIES:
            found = Run(policy, engines, arguments.rows or ROWS, arguments.threads)()
            found.policy = policy
            cases.append(found)
            print(f"  {engines} engines, {policy}: {found.rows / found.seconds:.1f} rows/s", file=sys.stderr)
    return {"cases": [asdict(found) for found in cases], "cost": asdict(fitted()), "engine": "real"}


def report(record: dict[str, Any]) -> str:
    cases = [Case(**found) for found in record["cases"]]
    lines = []
    for found in cases:
        others = [
            other.rows / other.seconds for other in cases if other.engines == found.engines and other.policy != "d2lpm"
        ]
        lines.append(
            (
                f"{found.engines} processes  {found.policy}",
                number(found.rows),
                number(found.seconds, ".1f"),
                number(found.rows / found.seconds, ".2f"),
                number(found.rows / found.seconds / max(others), ".2f"),
                number(found.hit_rate, ".1%"),
                number(found.jain, ".3f"),
                number(found.late, ".2f"),
            )
        )
    header = ("engines, routing", "rows", "seconds", "rows/s", "of best other", "found", "Jain", "last/median")
    return "\n".join([origin(record), "", table(header, lines)])
