"""The twenty queries three ways: stock Spark, by hand, and as written with our rules; calls, rows asked about, seconds.

With the fake engine calls are exact and seconds are those of Spark alone. With the real one prompts stay as they are
written, so that all ways ask the same, and each way has a system message of its own, so that none finds in the prefix
cache what another left.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from call_count_engine import fake_counting_engine, parts
from call_count_hand import Hand
from call_count_queries import QUERIES, Query
from call_count_tables import make_tables
from results import aligned, judge

import spark_llm
from spark_llm.demo.measure import settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STOCK, HAND, OURS = "stock Spark", "by hand", "ours"
RULES_OFF = {"spark.llm.optimizer.enabled": "false"}
WAYS: Mapping[str, Mapping[str, str]] = {STOCK: RULES_OFF, HAND: RULES_OFF, OURS: {}}
ROWS = {"fake": 2_000, "real": 200}
WORST = 1.05  # of calls by hand
MAX_TOKENS = 4
_CHOICE = re.compile(r"Answer only (.+?)\.")


@dataclass(frozen=True)
class Case:
    """One query one way. calls: of the model; asked: rows for which the function ran. same: has the rows of by hand."""

    query: str
    way: str
    calls: int
    asked: int
    seconds: float
    rows: int
    same: bool
    problem: str = ""


def fake_shopper(prompt: str) -> str:
    """A model that draws one of the answers it may give by a hash of the prompt's lines; Yes for three in ten."""
    instruction, fields = parts(prompt)
    digest = hashlib.blake2b("\n".join(sorted([instruction, *fields.values()])).encode(), digest_size=8).hexdigest()
    choice = _CHOICE.search(instruction)
    if choice is None:
        return f"words {digest}"
    options = re.split(r", | or ", choice[1])
    if options[0] == "Yes":
        return options[0] if int(digest, 16) % 10 < 3 else options[1]
    return options[int(digest, 16) % len(options)]


def run(kind: str, rows: int, names: Sequence[str], say: Callable[[str], None]) -> list[Case]:
    """All queries in all ways. kind: ``fake`` or ``real``, the engine."""
    spark = spark_llm.session(
        "local[2]",
        progress="false",
        conf={"spark.ui.enabled": "false", "spark.driver.memory": "1g"},
        cache_enabled=False,
        optimizer_may_change_prompts=kind == "fake",
    )
    spark.sparkContext.setLogLevel("ERROR")
    cases: list[Case] = []
    try:
        with tempfile.TemporaryDirectory() as folder, counting(spark, kind) as calls:
            make_tables(spark, Path(folder), rows)
            Hand(spark, "max_tokens => 1").rows("SELECT <LUXURY> FROM items LIMIT 1")  # starts workers and the engine
            for query in QUERIES:
                if names and query.name not in names:
                    continue
                found = run_query(spark, query, calls)
                cases += found
                for case in found:
                    say("  ".join(cells_of(case)))
    finally:
        spark.stop()
    return cases


@contextmanager
def counting(spark: SparkSession, kind: str) -> Iterator[Callable[[], int] | None]:
    """The way to count calls since the last time it was asked; None: by the reports of queries."""
    if kind == "real":
        yield None
        return
    with fake_counting_engine(spark, fake_shopper) as engine:

        def calls() -> int:
            made = engine.calls
            engine.forget()
            return made

        yield calls


def run_query(spark: SparkSession, query: Query, calls: Callable[[], int] | None) -> list[Case]:
    """One query in all ways, by hand first; the fake's counts and those of the reports agree, or it says so."""
    found: dict[str, Case] = {}
    expected: Sequence[Any] = []
    for number, way in enumerate((HAND, STOCK, OURS)):
        hand = Hand(
            spark, f"max_tokens => {MAX_TOKENS}, system => 'You are an analyst. You answer briefly. Run {number}.'"
        )
        before = {report.query for report in spark_llm.reports(spark)}
        if calls is not None:
            calls()
        rows: Sequence[Any] = []
        problem = ""
        started = time.monotonic()
        with settings(spark, WAYS[way]):
            try:
                rows = query.by_hand(hand) if way == HAND else hand.rows(query.sql)
            except Exception as error:
                problem = str(error).partition("\n")[0][:200]
        seconds = time.monotonic() - started
        reports = [report for report in spark_llm.reports(spark) if report.query not in before]
        if way == HAND:
            expected = rows
        found[way] = Case(
            query=query.name,
            way=way,
            calls=sum(report.calls for report in reports) if calls is None else calls(),
            asked=sum(report.rows - report.skipped for report in reports),
            seconds=seconds,
            rows=len(rows),
            same=len(rows) == len(expected) if query.limit else bag(rows) == bag(expected),
            problem=problem,
        )
    return [found[way] for way in WAYS]


def bag(rows: Sequence[Any]) -> Counter[str]:
    """Rows to be compared in any order; decimals and doubles as short text."""
    return Counter(" | ".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows)


def cells_of(case: Case) -> tuple[str, ...]:
    """One way of a query, for progress."""
    state = case.problem or ("" if case.same else "OTHER ROWS")
    return (case.query.ljust(38), case.way.ljust(12), f"{case.calls:>7,}", f"{case.seconds:>7.1f} s", state)


HEADER = (
    "query", "rows", "calls: stock", "by hand", "ours", "ours/by hand", "stock/ours",
    "seconds: stock", "by hand", "ours", "ours/by hand", "same rows",
)  # fmt: skip


def report(record: Mapping[str, Any]) -> str:
    """The table, and what is over by hand, from the JSON record."""
    cases = [Case(**entry) for entry in record["suite"]]
    by_query: dict[str, dict[str, Case]] = {}
    for case in cases:
        by_query.setdefault(case.query, {})[case.way] = case
    lines = [HEADER]
    for name, ways in by_query.items():
        stock, hand, ours = (ways[way] for way in WAYS)
        refused = bool(stock.problem)
        lines.append(
            (
                name,
                f"{ours.rows:,}",
                "refused" if refused else f"{stock.calls:,}",
                f"{hand.calls:,}",
                f"{ours.calls:,}",
                f"{ours.calls / max(1, hand.calls):.2f}",
                "" if refused else f"{stock.calls / max(1, ours.calls):.1f}",
                "" if refused else f"{stock.seconds:.1f}",
                f"{hand.seconds:.1f}",
                f"{ours.seconds:.1f}",
                f"{ours.seconds / hand.seconds:.2f}",
                "yes" if ours.same and (refused or stock.same) else "NO",
            )
        )
    return "\n".join([aligned(lines), "", *targets(by_query)])


def targets(by_query: Mapping[str, Mapping[str, Case]]) -> list[str]:
    """Each query whose calls are over those by hand, and the suite as a whole."""
    ratios = {name: ways[OURS].calls / max(1, ways[HAND].calls) for name, ways in by_query.items()}
    lines = [
        judge(f"{name}: calls of ours against by hand", ratio, WORST, below=True)
        for name, ratio in ratios.items()
        if ratio > WORST
    ]
    lines.append(judge("worst query: calls of ours against by hand", max(ratios.values()), WORST, below=True))
    ran = [ways for ways in by_query.values() if not ways[STOCK].problem]
    total = {way: sum(ways[way].calls for ways in ran) for way in WAYS}
    lines.append(f"calls of all queries that stock Spark runs: {', '.join(f'{way} {n:,}' for way, n in total.items())}")
    return lines


def as_record(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For the JSON file."""
    return [asdict(case) for case in cases]
