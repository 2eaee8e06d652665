"""From records of the fairness benchmarks to tables and to the targets that are met or missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fairness_cost import Cost
from fairness_run import Outcome
from machine import Machine

ENOUGH_OF_LPM, MORE_THAN_VTC, ROUTER_SHARE = 0.95, 2.0, 0.02  # the targets
PREFIX_HEAVY = ("shared prefixes", "disjoint prefixes")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; the first one to the left."""
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def origin(record: dict[str, Any]) -> str:
    """What it was measured on, and when."""
    cost = Cost(**record["cost"])
    clock = "steps of the real engine, timed" if record["engine"] == "real" else f"simulated: {cost.origin}"
    return f"{Machine(**record['machine'])}\n{clock}; {record['date']}, {record['revision']}"


def papers(record: dict[str, Any]) -> str:
    """The experiments of the papers, a line a scheduler."""
    outcomes = [Outcome(**outcome) for outcome in record["outcomes"]]
    shape = record["shape"]
    lines = []
    for outcome in outcomes:
        lpm = of(outcomes, outcome.experiment, "lpm")
        within = "" if outcome.bound is None else " of " + number(outcome.bound)
        lines.append(
            (
                f"{outcome.experiment if outcome.scheduler == outcomes[0].scheduler else '':18}{outcome.scheduler}",
                number(outcome.tokens),
                number(outcome.tokens / lpm.tokens if lpm and lpm.tokens else None, ".2f"),
                number(outcome.hit_rate, ".1%"),
                number(outcome.difference) + within,
                number(outcome.jain, ".3f"),
                number(outcome.behaved_p50, ".1f"),
                number(outcome.behaved_p99, ".1f"),
                number(outcome.unanswered, ".0%"),
            )
        )
    header = ("", "tokens/s", "of lpm", "found", "difference", "Jain", "p50 s", "p99 s", "left")
    sizes = (
        f"{outcomes[0].seconds:.0f} s each; steps of {shape['batch_tokens']} tokens, {shape['running_rows']} rows at a "
        f"time, a cache of {shape['pages'] * shape['page_size']:,} tokens, quantum {shape['quantum']:,}"
    )
    return "\n".join([origin(record), sizes, "", table(header, lines), "", *verdicts(outcomes)])


def of(outcomes: Sequence[Outcome], experiment: str, scheduler: str) -> Outcome | None:
    found = [outcome for outcome in outcomes if (outcome.experiment, outcome.scheduler) == (experiment, scheduler)]
    return found[0] if found else None


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """The issue's targets, one a line."""
    lines = []
    for experiment in dict.fromkeys(outcome.experiment for outcome in outcomes):
        dlpm, lpm, vtc = (of(outcomes, experiment, name) for name in ("dlpm", "lpm", "vtc"))
        if dlpm is None:
            continue
        if dlpm.bound is not None:
            lines.append(
                f"{met(dlpm.difference <= dlpm.bound)} {experiment}: difference of service under dlpm within 2(U+Q)"
            )
        if lpm is not None and lpm.tokens:
            share = dlpm.tokens / lpm.tokens
            lines.append(
                f"{met(share >= ENOUGH_OF_LPM)} {experiment}: dlpm at {share:.2f} of lpm's tokens/s "
                f"(at least {ENOUGH_OF_LPM})"
            )
        if vtc is not None and vtc.tokens and experiment in PREFIX_HEAVY:
            times = dlpm.tokens / vtc.tokens
            lines.append(
                f"{met(times >= MORE_THAN_VTC)} {experiment}: dlpm at {times:.1f}x vtc's tokens/s "
                f"(at least {MORE_THAN_VTC:.1f}x)"
            )
    return lines


def met(holds: bool) -> str:
    return "met   " if holds else "missed"


def quantum(record: dict[str, Any]) -> str:
    """What the quantum trades, prefixes shared."""
    outcomes = [Outcome(**outcome) for outcome in record["outcomes"]]
    lines = []
    for outcome, size in zip(outcomes, record["quanta"], strict=True):
        lpm = of(outcomes, outcome.experiment, "lpm")
        lines.append(
            (
                f"{outcome.experiment:18}" + (f"dlpm {size:,}" if outcome.scheduler == "dlpm" else outcome.scheduler),
                number(outcome.tokens),
                number(outcome.tokens / lpm.tokens if lpm and lpm.tokens else None, ".2f"),
                number(outcome.hit_rate, ".1%"),
                number(outcome.difference),
                number(outcome.jain, ".3f"),
                number(outcome.behaved_p50, ".1f"),
                number(outcome.behaved_p99, ".1f"),
            )
        )
    header = ("quantum", "tokens/s", "of lpm", "found", "difference", "Jain", "p50 s", "p99 s")
    return "\n".join([origin(record), "", table(header, lines)])
