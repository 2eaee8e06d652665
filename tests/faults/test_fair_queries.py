"""Two queries at a time through real Spark and a real engine: the small one does not wait for the backfill, and what is
cancelled, killed or no longer needed leaves the engine.

Nothing here is measured in seconds: tests look at how far the backfill is when the small query is done.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from spark_llm.engine.service.protocol import EngineStatus

pytestmark = [pytest.mark.faults, pytest.mark.spark, pytest.mark.timeout(600)]
Engines = Any  # the fixture of conftest.py

_DRIVER = """
import json, os, sys, threading
import spark_llm

master, model = sys.argv[1:]
options = {"model": model, "engine_kv_cache_memory": "16m", "engine_threads": 1, "engine_max_running_rows": 16}
options |= {"engine_dtype": "float32", "engine_check_invariants": True, "optimizer_statistics_enabled": False}
conf = {"spark.ui.enabled": "false", "spark.executor.memory": "512m", "spark.task.maxFailures": 3}
spark = spark_llm.session(master=master, conf=conf, **options)
context = spark.sparkContext
context.setLogLevel("OFF")
printing = threading.Lock()

def say(**what):
    with printing:
        print(json.dumps(what), flush=True)

def run(name, first, rows, partitions, length, limit, settings):
    session = spark.newSession()
    context.addJobTag(name)
    context.setJobGroup(name, name)
    for key, value in settings.items():
        session.conf.set(key, value)
    call = f"llm('Say it.', concat('row ', id), max_tokens => {length})"
    frame = session.range(first, first + rows, 1, partitions).selectExpr("id", f"{call} AS a")
    try:
        found = (frame.limit(limit) if limit else frame).collect()
        say(name=name, answers={row.id: row.a for row in found}, rows=len(found))
    except Exception as error:
        say(name=name, error=type(error).__name__)

home = context._jvm.System.getenv("SPARK_HOME")
say(work=os.path.join(home, "work", context.applicationId))
for line in sys.stdin:
    order = json.loads(line)
    match order.pop("do"):
        case "run":
            # A thread of PySpark's own, with local properties of its own.
            from pyspark import InheritableThread
            InheritableThread(target=run, kwargs=order, daemon=True).start()
        case "cancel group":
            context.cancelJobGroup(order["name"])
        case "cancel tag":
            context.cancelJobsWithTag(order["name"])
        case "kill tasks":
            store = context._jsc.sc().statusStore()
            for stage in context.statusTracker().getActiveStageIds():
                tasks = store.taskList(stage, 0, 100)
                for task in [tasks.apply(number) for number in range(tasks.size())]:
                    if task.status() == "RUNNING":
                        context._jsc.sc().killTaskAttempt(task.taskId(), True, "a test")
spark.stop()
"""


class Driver:
    """A Spark driver in another process that runs queries when told."""

    def __init__(self, engines: Engines, master: str) -> None:
        self.engines = engines
        self.process = engines.python(_DRIVER, master, engines.model)
        self.work = self.hear()["work"]

    def tell(self, do: str, **what: object) -> None:
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()

    def run(
        self, name: str, rows: int, *, first: int = 0, partitions: int = 12, length: int = 8, limit: int = 0, **set: str
    ) -> None:
        settings = {f"spark.llm.{key.replace('_', '.')}": text for key, text in set.items()}
        of = {"name": name, "first": first, "rows": rows, "partitions": partitions, "length": length, "limit": limit}
        self.tell("run", **of, settings=settings)

    def hear(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the driver has ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def answers(self, name: str) -> dict[str, str]:
        """The answers of the query that is the next to end."""
        heard = self.hear()
        assert heard.get("name") == name, heard
        found: dict[str, str] = heard["answers"]
        assert len(found) == heard["rows"], "no row twice"
        return found

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        shutil.rmtree(self.work, ignore_errors=True)


@pytest.fixture(scope="module")
def driver(shared_engines: Engines) -> Iterator[Driver]:
    """One driver with one engine for the tests that look at a single executor; each of them leaves both idle."""
    found = Driver(shared_engines, "local[4,3]")
    yield found
    found.close()


def is_idle(status: EngineStatus) -> bool:
    """No row of any stream is left, and no page is held but by the cache."""
    return (status.streams, status.waiting, status.running) == (0, 0, 0) and status.free_pages == status.total_pages


def test_a_small_query_does_not_wait_for_a_backfill(driver: Driver) -> None:
    """The backfill has 12 partitions for 4 slots; it takes 2 of them, and half of the engine."""
    engines = driver.engines
    driver.run("backfill", 2400, length=60)
    status = engines.await_status(lambda status: status.running == 16)
    assert status.streams == 2, "half of the slots"
    driver.run("small", 100, first=10_000, partitions=4, length=8, limit=20)
    small = driver.answers("small")
    [status] = engines.statuses()
    answered = answered_of(status)
    assert len(small) == 20
    assert 0 < answered < 1200, "the small query ends long before the backfill"
    assert status.streams == 2
    engines.await_status(lambda status: len(status.clients) == 1)  # the session of the small query is gone

    driver.tell("cancel group", name="backfill")
    assert "error" in driver.hear()
    engines.await_status(is_idle)
    driver.run("small", 100, first=10_000, partitions=4, length=8, limit=20)
    assert driver.answers("small") == small, "the same answers alone, from the cache or not"
    engines.await_status(is_idle)


def test_what_is_cancelled_leaves_the_other_query_complete_and_right(driver: Driver) -> None:
    engines = driver.engines
    driver.run("endless", 100, first=10_000, length=8000)
    engines.await_status(lambda status: status.running == 16)
    driver.run("other", 120, length=16)
    engines.await_status(lambda status: status.streams == 4)
    driver.tell("cancel tag", name="endless")
    heard = [driver.hear(), driver.hear()]
    assert {found["name"] for found in heard if "error" in found} == {"endless"}
    [answers] = [found["answers"] for found in heard if "answers" in found]
    assert sorted(map(int, answers)) == list(range(120))
    engines.await_status(is_idle)
    driver.run("again", 120, length=16, partitions=1, cache_enabled="false")
    assert driver.answers("again") == answers, "one task, nothing beside it, nothing remembered"
    engines.await_status(is_idle)


def test_killed_workers_killed_tasks_and_a_limit_leave_nothing_behind(driver: Driver) -> None:
    engines = driver.engines
    for turn, how in enumerate(("workers", "tasks")):
        known = frozenset(query for status in engines.statuses() for query in status.queries)
        driver.run(how, 120, first=1000 * turn, length=100)
        before = engines.await_status(lambda status, known=known: has_begun(status, known))
        if how == "workers":
            for worker in workers(driver):
                worker.send_signal(signal.SIGKILL)
        else:
            driver.tell("kill tasks")
        assert sorted(map(int, driver.answers(how))) == list(range(1000 * turn, 1000 * turn + 120))
        status = engines.await_status(is_idle)
        assert status.rows_received == before.rows_received + 120, "Spark ran both tasks again"
        assert status.rows_folded >= before.rows_folded + 16, "and what they had is remembered"

    driver.run("limited", 4000, first=10_000, partitions=2, limit=5)
    assert len(driver.answers("limited")) == 5
    engines.await_status(is_idle)


def has_begun(status: EngineStatus, known: frozenset[str]) -> bool:
    """Has the query that is not among the known ones its first answers?"""
    found = [counts for query, counts in status.queries.items() if query not in known]
    return bool(found) and found[-1][0] == 120 and found[-1][1] >= 16


def answered_of(status: EngineStatus) -> int:
    """Rows answered of the query that asks the most: the backfill."""
    return max(status.queries.values(), default=(0, 0))[1]


def workers(driver: Driver) -> list[psutil.Process]:
    """The Python workers that hold a connection to an engine or may: children of PySpark's daemons."""
    found = psutil.Process(driver.process.pid).children(recursive=True)
    living = [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
    daemons = [process for process in living if "pyspark.daemon" in " ".join(process.cmdline())]
    pids = {process.pid for process in daemons}
    return [process for process in daemons if process.ppid() in pids]


@pytest.mark.slow
def test_a_small_query_beside_a_backfill_on_two_executors(engines: Engines) -> None:
    """Two slots an executor: one of each is the backfill's."""
    driver = Driver(engines, "local-cluster[2,2,2048]")
    driver.run("backfill", 4800, partitions=16, length=60)
    engines.await_status(lambda status: status.running == 16)
    driver.run("small", 100, first=10_000, partitions=4, length=8, limit=20)
    assert len(driver.answers("small")) == 20
    statuses = engines.statuses()
    assert sum(answered_of(status) for status in statuses) < 2400
    assert all(status.streams <= 1 for status in statuses)
    driver.tell("cancel group", name="backfill")
    assert "error" in driver.hear()
    for _ in statuses:
        engines.await_status(is_idle)
    driver.close()
    assert os.path.isabs(driver.work)
