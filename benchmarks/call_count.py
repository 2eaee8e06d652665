"""How many calls queries make: stock Spark, by hand, and with our rules; and what queries without a call pay.

    .venv/bin/python benchmarks/call_count.py                              all parts (about ten minutes on two cores)
    .venv/bin/python benchmarks/call_count.py --part shapes                query shapes: stock Spark, the least, ours
    .venv/bin/python benchmarks/call_count.py --part suite                 twenty analytic queries, calls (fake engine)
    .venv/bin/python benchmarks/call_count.py --part suite --engine real   the same on the demo model, seconds
    .venv/bin/python benchmarks/call_count.py --part planning              planning of fifty queries without a call

Calls are counted by a fake engine (call_count_engine.py): the real service, and in place of the model a function. So
calls are exact, and seconds are those of Spark alone; seconds with a model are those of ``--engine real``. Each part
writes artifacts/call_count_<part>.json, and ``write_call_count.py`` puts them into docs/calls-made.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import call_count_measure
import call_count_planning
import call_count_suite
from cpu_engine import ROOT, revision
from machine import Machine, this_machine

REPORT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "shapes": call_count_measure.report,
    "suite": call_count_suite.report,
    "suite_real": call_count_suite.report,
    "planning": call_count_planning.report,
}
ENGINES = {"fake": "fake engine: calls are exact, seconds are those of Spark alone", "real": "the demo model"}


def say(line: str) -> None:
    """Progress, line by line."""
    print(line, flush=True)


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part's figures."""
    if part == "shapes":
        return {"shapes": call_count_measure.as_record(call_count_measure.run(say))}
    if part == "planning":
        return {"planning": call_count_planning.as_record(call_count_planning.run(arguments.rounds, say))}
    rows = arguments.rows or call_count_suite.ROWS[arguments.engine]
    cases = call_count_suite.run(arguments.engine, rows, arguments.query, say)
    return {"engine": arguments.engine, "sales": rows, "suite": call_count_suite.as_record(cases)}


def report(record: Mapping[str, Any]) -> str:
    """A part's run as text: machine, revision, engine, table, targets."""
    lines = [str(Machine(**record["machine"])), f"revision {record['revision']}, {record['date']}"]
    if "engine" in record:
        lines.append(f"{record['sales']:,} sales; {ENGINES[record['engine']]}")
    return "\n".join([*lines, "", REPORT[record["part"]](record)])


def path_of(part: str) -> Path:
    """Where a part's record is."""
    return ROOT / "artifacts" / f"call_count_{part}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=["shapes", "suite", "planning"], help="default: all")
    parser.add_argument("--engine", choices=[*ENGINES], default="fake", help="of the suite")
    parser.add_argument("--rows", type=int, help="sales of the suite; default: 2,000, with a real engine 200")
    parser.add_argument("--query", action="append", default=[], help="only this query of the suite, by its name")
    parser.add_argument("--rounds", type=int, default=15, help="of planning")
    parser.add_argument("--out", type=Path, help="where to write instead (one part only)")
    found = parser.parse_args(arguments)
    found.part = found.part or ["shapes", "suite", "planning"]
    if found.out and len(found.part) > 1:
        parser.error("--out needs one --part")
    return found


def main() -> None:
    arguments = parse(None)
    for part in arguments.part:
        name = "suite_real" if part == "suite" and arguments.engine == "real" else part
        machine = this_machine()
        head = {"machine": asdict(machine), "revision": revision(), "date": datetime.date.today().isoformat()}
        record = {"part": name, **head, **measure(part, arguments)}
        print("\n" + report(record))
        out = arguments.out or path_of(name)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record))
        print(f"\nwritten: {out}\n")


if __name__ == "__main__":
    main()
