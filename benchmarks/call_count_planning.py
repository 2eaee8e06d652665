"""What queries without an llm() call pay for the rules: planning time of fifty, with spark-llm enabled and without.

Three sessions, each in a process of its own, plan the same queries turn by turn: one with spark-llm and two without.
How far the two without are apart is the noise. A fresh plan is made each time, to the physical plan; nothing runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from call_count_tables import make_tables
from results import judge

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

WITH, WITHOUT, AGAIN = "with spark-llm", "without", "without, again"
WARM_ROUNDS = 6  # plan slower: the JVM compiles
ROWS = 200

_SOURCES = {
    "sales": ("sales", "city", "quantity"),
    "items": ("sales JOIN items USING (item_id)", "brand", "price"),
    "customers": ("sales JOIN customers USING (customer_id)", "segment", "quantity"),
    "reviews": ("reviews JOIN items USING (item_id)", "category", "stars"),
    "all": ("sales JOIN items USING (item_id) JOIN customers USING (customer_id)", "city", "price"),
}
_FORMS = (
    "SELECT {g}, count(*) AS n, avg({v}) AS m FROM {s} GROUP BY {g} HAVING count(*) > 2 ORDER BY n DESC",
    "SELECT item_id, {v}, rank() OVER (PARTITION BY item_id ORDER BY {v} DESC) AS r FROM {s}",
    "WITH c AS (SELECT {g} AS g, sum({v}) AS v FROM {s} GROUP BY 1) SELECT x.g, y.g FROM c x JOIN c y ON x.v < y.v",
    "SELECT {g}, {v} FROM {s} WHERE {v} > 2 UNION SELECT {g}, {v} FROM {s} WHERE {v} < 5",
    "SELECT * FROM {s} WHERE item_id IN (SELECT item_id FROM reviews WHERE stars > 3) AND {v} BETWEEN 1 AND 4",
    "SELECT {g}, max({v}) AS m FROM {s} WHERE EXISTS (SELECT 1 FROM sales z WHERE z.day = {v}) GROUP BY {g}",
    "SELECT {g}, CASE WHEN {v} > 3 THEN upper({g}) WHEN {v} IS NULL THEN 'none' ELSE concat({g}, '!') END AS c"
    " FROM {s} ORDER BY {v} DESC, 1 LIMIT 10",
    "SELECT {g}, {v}, count(DISTINCT item_id) AS n FROM {s} GROUP BY ROLLUP ({g}, {v})",
    "SELECT {g}, {v} - (SELECT avg({v}) FROM {s}) AS d FROM {s} WHERE {v} > (SELECT min({v}) FROM {s})",
    "SELECT DISTINCT {g}, e FROM {s} LATERAL VIEW explode(array({v}, 1, 2)) t AS e WHERE length({g}) > 2 AND e > 0",
)


def queries() -> list[str]:
    """Fifty queries: ten forms over five sources."""
    sales_by_city = "(SELECT sales.*, concat('city ', customer_id % 6) AS city FROM sales)"
    return [
        form.format(s=sales_by_city if source == "sales" else source, g=g, v=v)
        for source, g, v in _SOURCES.values()
        for form in _FORMS
    ]


@dataclass(frozen=True)
class Planning:
    """Milliseconds of planning each query, the median over rounds, by session.

    python_calls: how often a rule in Python was asked; calls_for_llm: the same for one query with a call, to show that
    the count works.
    """

    milliseconds: dict[str, list[float]]
    rounds: int
    python_calls: int
    calls_for_llm: int


def run(rounds: int, say: Callable[[str], None]) -> Planning:
    """Plan all queries ``rounds`` times in each session, turn by turn."""
    times: dict[str, list[list[float]]] = {WITH: [], WITHOUT: [], AGAIN: []}
    with tempfile.TemporaryDirectory() as folder:
        processes = {name: _start(name == WITH, Path(folder) / str(n)) for n, name in enumerate(times)}
        try:
            for number in range(WARM_ROUNDS + rounds):
                names = list(times)
                for name in names[number % 3 :] + names[: number % 3]:
                    found = _ask(processes[name], "plan")
                    if number >= WARM_ROUNDS:
                        times[name].append(found["milliseconds"])
                if number >= WARM_ROUNDS:
                    say("  ".join(f"{name} {sum(times[name][-1]):,.0f} ms" for name in names))
            counted = _ask(processes[WITH], "plan")["python_calls"]
            asked = _ask(processes[WITH], "llm")["python_calls"]
        finally:
            for process in processes.values():
                process.communicate("end\n", timeout=60)
    medians = {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in times.items()}
    return Planning(medians, rounds, counted, asked - counted)


def _start(enabled: bool, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "with" if enabled else "without", str(folder)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _ask(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def serve(enabled: bool, folder: Path, requests: IO[str], answers: IO[str]) -> None:
    """One session: plans all queries, or one with a call, for each line of ``requests``."""
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.memory", "1g")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    asked = _enable(spark) if enabled else []
    folder.mkdir()
    make_tables(spark, folder, ROWS)
    known = queries()
    for line in requests:
        if line.strip() == "end":
            break
        todo = known if line.strip() == "plan" else ["SELECT if(stars > 2, llm('p', review), 'x') AS r FROM reviews"]
        found = {"milliseconds": [_planned(spark, sql) for sql in todo], "python_calls": len(asked)}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
    spark.stop()


def _enable(spark: SparkSession) -> list[str]:
    """Enable spark-llm; what it returns grows by one for each time that Python is asked about a plan."""
    import spark_llm
    from spark_llm.functions.registry import Registry

    asked: list[str] = []
    optimize = Registry._optimize

    def counted(registry: Registry, *given: Any) -> Any:
        asked.append("rules")
        return optimize(registry, *given)

    Registry._optimize = counted  # type: ignore[method-assign]
    spark_llm.enable(spark, progress=False)
    return asked


def _planned(spark: SparkSession, sql: str) -> float:
    """Milliseconds from SQL text to the physical plan."""
    started = time.perf_counter()
    spark.sql(sql)._jdf.queryExecution().executedPlan()
    return 1000 * (time.perf_counter() - started)


def report(record: Mapping[str, Any]) -> str:
    """Totals, the ratio and the noise, from the JSON record."""
    found = Planning(**record["planning"])
    total = {name: sum(times) for name, times in found.milliseconds.items()}
    base = (total[WITHOUT] + total[AGAIN]) / 2
    noise = abs(total[WITHOUT] - total[AGAIN]) / base
    ratio = total[WITH] / base
    each = [
        with_ / min(one, other)
        for with_, one, other in zip(*(found.milliseconds[name] for name in (WITH, WITHOUT, AGAIN)), strict=True)
    ]
    lines = [f"planning {len(each)} queries without a call, medians of {found.rounds} rounds, added up:"]
    lines += [f"  {name:<16}{ms:>9,.1f} ms" for name, ms in total.items()]
    lines += [
        f"with spark-llm against without: {ratio:.3f}; the two without differ by {noise:.1%}; "
        f"query by query, against the faster: median {statistics.median(each):.3f}",
        judge("with spark-llm, beyond without", ratio - 1, max(noise, 0.03), below=True),
        judge("times that Python was asked about a plan", float(found.python_calls), 0.5, below=True),
        f"(about one query with a call Python was asked {found.calls_for_llm} times)",
    ]
    return "\n".join(lines)


def as_record(found: Planning) -> dict[str, Any]:
    """For the JSON file."""
    return asdict(found)


def main(arguments: Sequence[str]) -> None:
    serve(arguments[0] == "with", Path(arguments[1]), sys.stdin, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
