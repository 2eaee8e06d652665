"""Plain text for a terminal: rows, a short physical plan, two runs side by side, the summary."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import Row, SparkSession

    from spark_llm.demo.measure import Comparison
    from spark_llm.report import Report

PLAN_LINES = 14


def width() -> int:
    """Columns to write in: the terminal's, within reason."""
    return min(max(shutil.get_terminal_size((120, 40)).columns, 80), 140)


def table(rows: Sequence[Sequence[Any]], head: Sequence[str], numbers_from: int = 1_000) -> str:
    """Rows under a head, columns padded; columns from ``numbers_from`` on are right-aligned."""
    cells = [list(head), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    while sum(widths) + 2 * len(widths) > width() and max(widths) > 12:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in cells:
        padded = [
            _cut(cell, size).rjust(size) if i >= numbers_from else _cut(cell, size).ljust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def first_rows(rows: Sequence[Row], count: int = 5) -> str:
    """The first rows of a result."""
    if not rows:
        return "  (no rows)"
    return table([list(row) for row in rows[:count]], list(rows[0].asDict()))


def plan(spark: SparkSession, select: str) -> str:
    """The operators of the physical plan, a line each, without numbers and with their arguments cut."""
    text = str(spark.sql(f"EXPLAIN {select}").collect()[0][0])
    operators = [line for line in text.splitlines() if re.search(r"\w", line) and not line.startswith("==")]
    lines = [_cut(re.sub(r"#\d+L?|, \[plan_id=\d+\]", "", line), width() - 2) for line in operators]
    if len(lines) > PLAN_LINES:
        lines = [*lines[:PLAN_LINES], f"... {len(lines) - PLAN_LINES} more operators"]
    return "\n".join(f"  {line}" for line in lines)


def comparison(result: Comparison) -> str:
    """The report of a query, beside the naive run of a sample."""
    ours, naive = result.ours.report, result.naive.report
    shown = [(name, key) for name, key in _LINES if key not in _RARE or getattr(ours, key) or getattr(naive, key)]
    rows = [(name, _count(ours, key), _count(naive, key)) for name, key in shown]
    rows.append(("seconds", f"{ours.seconds:.1f}", f"{naive.seconds:.1f}"))
    rows.append(("seconds a row", f"{result.ours.seconds_per_row:.3f}", f"{result.naive.seconds_per_row:.3f}"))
    if ours.failed or naive.failed:
        rows.append(("rows that failed", f"{ours.failed:,}", f"{naive.failed:,}"))
    text = table(rows, ["", "spark-llm", f"naive, {result.sampled} rows sampled"], numbers_from=1)
    text += f"\n  {result.speedup:.1f}x less time a row than naively"
    if result.same is not None:
        text += f"; {result.same} of {result.compared} sampled result rows are the same"
    return text


def summary(results: Sequence[Comparison]) -> str:
    """One line a query, and all together."""
    head = ["query", "rows", "calls", "folded", "prompt tok.", "computed", "hits", "data", "instr.", "s"]
    head += ["ms/row", "naive ms/row", "ratio"]
    rows = []
    for result in results:
        r = result.ours.report
        rows.append(
            (
                result.example.name,
                f"{r.rows:,}",
                f"{r.calls:,}",
                f"{r.duplicates:,}",
                f"{r.prompt_tokens:,}",
                f"{r.computed_tokens:,}",
                f"{r.prefix_hit_rate:.0%}",
                f"{r.data_hit_rate:.0%}",
                f"{r.instruction_hit_rate:.0%}",
                f"{r.seconds:.1f}",
                f"{1000 * result.ours.seconds_per_row:.0f}",
                f"{1000 * result.naive.seconds_per_row:.0f}",
                f"{result.speedup:.1f}x",
            )
        )
    return table(rows, head, numbers_from=1)


_LINES = (
    ("rows", "rows"),
    ("calls made", "calls"),
    ("duplicates folded", "duplicates"),
    ("from the result cache", "stored"),
    ("rows not needed", "skipped"),
    ("prompt tokens", "prompt_tokens"),
    ("tokens computed", "computed_tokens"),
    ("prefix hit rate", "prefix_hit_rate"),
    ("  of data", "data_hit_rate"),
    ("  of instruction", "instruction_hit_rate"),
    ("output tokens", "output_tokens"),
)
_RARE = ("stored", "skipped")  # lines of their own only where there are such rows


def _count(report: Report, key: str) -> str:
    value = getattr(report, key)
    return f"{value:.1%}" if key.endswith("rate") else f"{value:,}"


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(str(value).split())


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"
