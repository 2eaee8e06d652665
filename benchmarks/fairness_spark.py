"""A small query beside a backfill in one Spark application: each scheduler, task slots held back or not.

.venv/bin/python benchmarks/fairness_spark.py [--rows 3000] [--length 16] [--turns 5]

The backfill starts first and has more partitions than slots; the small query is a ``LIMIT 20`` whose time counts from
its submit; it is run again as long as less than half of the backfill is done. Target: at most 3 times as long as
alone (with dlpm and slots held back). Both run with the packaged model on ``local[4]``; nothing comes from the result
cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpu_engine import ROOT, revision
from fairness_report import table
from machine import Machine, this_machine
from pyspark import InheritableThread
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import datasets
from spark_llm.config_sharing import SCHEDULERS
from spark_llm.engine.service.client import list_engines

OUT = ROOT / "artifacts" / "fairness_spark.json"
TARGET = 3.0
PARTITIONS = 40
PATIENCE = 300.0  # seconds after which the small query counts as one that waits for the backfill
CASES = [*((scheduler, True) for scheduler in SCHEDULERS), ("dlpm", False), ("fcfs", False)]


@dataclass
class Case:
    """alone, beside: seconds of the small query, the median of the turns; None: it did not end within PATIENCE.

    Beside are the turns that began before half of the backfill was done, ``turns``; worst: the longest of them.
    done: the share of its rows that the backfill had when the last of them ended.
    """

    scheduler: str
    held: bool
    alone: float
    beside: float | None
    worst: float | None
    turns: int
    done: float

    @property
    def ratio(self) -> float | None:
        return None if self.beside is None else self.beside / self.alone


class Bench:
    """One Spark application with four task slots."""

    def __init__(self, rows: int, length: int, turns: int) -> None:
        self._rows, self._length, self._turns = rows, length, turns
        conf = {"spark.ui.enabled": "false", "spark.log.level": "ERROR"}
        options = {"cache_enabled": False, "engine_idle_timeout": "30s", "progress": "false"}
        options |= {"optimizer_statistics_enabled": False}
        self.spark = spark_llm.session("local[4]", conf=conf, **options)
        self._asked = 0

    def case(self, scheduler: str, held: bool) -> Case:
        """The small query alone, then beside the backfill."""
        settings = {"scheduler": scheduler, "optimizer.holdTaskSlots.enabled": str(held).lower()}
        small, large = self._session(settings), self._session(settings)
        self._small(small)  # starts the engine
        alone = statistics.median(self._small(small) for _ in range(self._turns))
        backfill = InheritableThread(target=self._backfill, args=(large,))
        backfill.start()
        self._await(lambda: self._answered() > 0)
        times: list[float] = []
        done = [0.0]

        def turns() -> None:
            while len(times) < self._turns and done[-1] < 0.5:
                times.append(self._small(small))
                done.append(self._answered() / self._rows)

        runner = InheritableThread(target=turns)
        runner.start()
        runner.join(PATIENCE)
        is_late = runner.is_alive()
        for group in ("backfill", "small"):
            self.spark.sparkContext.cancelJobGroup(group)
        backfill.join()
        runner.join()
        self._await(lambda: not any(status.streams for status in list_engines()))
        beside, worst = (None, None) if is_late else (statistics.median(times), max(times))
        return Case(scheduler, held, alone, beside, worst, len(times), done[-1])

    def _session(self, settings: dict[str, str]) -> SparkSession:
        session = self.spark.newSession()
        for key, text in settings.items():
            session.conf.set(f"spark.llm.{key}", text)
        datasets.register(session, "movies")
        return session

    def _small(self, session: SparkSession) -> float:
        """Seconds of the small query, about rows that no query has asked about."""
        self._asked += 1
        self.spark.sparkContext.setJobGroup("small", "small")
        call = f"llm('Does the critic like the film? Answer yes or no.', quote, turn => {self._asked}, max_tokens => 2)"
        start = time.monotonic()
        try:
            session.sql(f"SELECT review_id, {call} FROM reviews LIMIT 20").collect()
        except Exception as error:  # cancelled: it took too long
            print(f"small query: {type(error).__name__}")
            return PATIENCE
        return time.monotonic() - start

    def _backfill(self, session: SparkSession) -> None:
        self._asked += 1
        self.spark.sparkContext.setJobGroup("backfill", "backfill")
        note = f"concat('The film of ', 1900 + id % 120, ' was shown ', id, ' times in {self._asked} towns.')"
        call = f"llm('Say in one sentence what this is about.', note => {note}, max_tokens => {self._length})"
        try:
            session.sql(f"SELECT id, {call} FROM range(0, {self._rows}, 1, {PARTITIONS})").collect()
        except Exception as error:
            print(f"backfill: {type(error).__name__}")

    def _answered(self) -> int:
        """Rows of the backfill that the engine has answered: it is the query that asks the most."""
        found = [counts for status in list_engines() if status.streams for counts in status.queries.values()]
        return max(found, default=(0, 0))[1]

    @staticmethod
    def _await(condition: Any) -> None:
        tick = threading.Event()
        while not condition():
            tick.wait(0.1)


def report(record: dict[str, Any]) -> str:
    """The table, and whether the target is met."""
    cases = [Case(**case) for case in record["cases"]]
    head = ["scheduler", "task slots", "alone, s", "beside, s", "worst, s", "turns", "times alone", "backfill done"]
    lines = [
        [
            case.scheduler,
            "half" if case.held else "all",
            f"{case.alone:.2f}",
            f"> {PATIENCE:.0f}" if case.beside is None else f"{case.beside:.2f}",
            "-" if case.worst is None else f"{case.worst:.2f}",
            str(case.turns),
            "-" if case.ratio is None else f"{case.ratio:.1f}",
            f"{case.done:.0%}",
        ]
        for case in cases
    ]
    first = cases[0]
    met = first.ratio is not None and first.ratio <= TARGET
    target = f"target: at most {TARGET:g} times alone with {first.scheduler} and half of the slots"
    made = f"{record['rows']:,} rows of the backfill; {record['date']}, {record['revision']}"
    machine = str(Machine(**record["machine"]))
    return "\n".join([machine, made, "", table(head, lines), "", f"{target}: {'met' if met else 'missed'}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="of the backfill")
    parser.add_argument("--length", type=int, default=16, help="most tokens of its answers")
    parser.add_argument("--turns", type=int, default=5, help="of the small query")
    parser.add_argument("--only", choices=SCHEDULERS, help="one scheduler, with task slots held back")
    given = parser.parse_args(arguments)
    machine = this_machine()
    bench = Bench(given.rows, given.length, given.turns)
    cases = [bench.case(*case) for case in ([(given.only, True)] if given.only else CASES)]
    bench.spark.stop()
    record = {
        "machine": asdict(machine),
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision(),
        "rows": given.rows,
        "cases": [asdict(case) for case in cases],
    }
    if not given.only:
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(record, indent=1), "utf-8")
    print(report(record))


if __name__ == "__main__":
    main()
