"""Prefix order: what it finds, what it costs, and what it saves, on tables of the shape of the paper's.

    .venv/bin/python benchmarks/prefix_order.py                     all parts (about an hour on two cores)
    .venv/bin/python benchmarks/prefix_order.py --part solver       orders of rows and fields, hits in tokens
    .venv/bin/python benchmarks/prefix_order.py --part spark        the same through Spark, by partitions
    .venv/bin/python benchmarks/prefix_order.py --part queries      the paper's 16 queries on the demo model
    .venv/bin/python benchmarks/prefix_order.py --part rendering    ways to write a field into a prompt

Each part writes artifacts/prefix_order_<part>.json; ``write_prefix_order.py`` puts them into docs/prefix-order.md, and
``plot_prefix_order.py`` draws the queries. With ``--data FOLDER`` the tables beer.csv and movies_small.csv that
the authors published are measured, too, where they are there.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import prefix_order_queries
import prefix_order_renderings
import prefix_order_solver
import prefix_order_spark
from cpu_engine import ROOT, revision
from machine import Machine, this_machine
from prefix_order_hits import demo_pipeline

from spark_llm.datasets import paper

NAMES = (*paper.TABLES, paper.DISJOINT)


def measure_solver(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    few = {name: arguments.ggr_rows for name in (*NAMES, *prefix_order_solver.REAL.values()) if arguments.ggr_rows}
    cases = prefix_order_solver.run(demo_pipeline(), arguments.tables, arguments.rows, arguments.data, few, say)
    return {"solver": [asdict(case) for case in cases]}


def measure_spark(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    cases = prefix_order_spark.run(arguments.tables, arguments.rows, arguments.data, arguments.partitions, say)
    return {"spark": prefix_order_spark.as_record(cases)}


def measure_queries(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    names = [name for name, query in paper.QUERIES.items() if query.table in arguments.tables]
    return {"queries": prefix_order_queries.as_record(prefix_order_queries.run(arguments.rows, machine, names, say))}


def measure_rendering(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    costs = prefix_order_renderings.measure(arguments.tables, arguments.rows, arguments.data)
    return {"rendering": [asdict(cost) for cost in costs]}


MEASURE: Mapping[str, Callable[[argparse.Namespace, Machine], dict[str, Any]]] = {
    "rendering": measure_rendering,
    "solver": measure_solver,
    "spark": measure_spark,
    "queries": measure_queries,
}
REPORT: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "rendering": prefix_order_renderings.report,
    "solver": prefix_order_solver.report,
    "spark": prefix_order_spark.report,
    "queries": prefix_order_queries.report,
}


def say(line: str) -> None:
    """Progress, line by line."""
    print(line, flush=True)


def report(record: Mapping[str, Any]) -> str:
    """A part's run as text: machine, revision, tables, targets."""
    machine = Machine(**record["machine"])
    head = f"{machine}\nrevision {record['revision']}, {record['date']}\n"
    return f"{head}\n{REPORT[record['part']](record)}"


def path_of(part: str) -> Path:
    """Where a part's record is."""
    return ROOT / "artifacts" / f"prefix_order_{part}.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=[*MEASURE], help="default: all")
    parser.add_argument("--tables", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rows", type=int, help="rows of a table; default: as in the paper (queries: 20 to 100)")
    parser.add_argument("--ggr-rows", type=int, default=0, help="run GGR on that many rows only; 0: on all")
    parser.add_argument("--partitions", type=int, nargs="+", default=list(prefix_order_spark.PARTITIONS))
    parser.add_argument("--data", type=Path, help="folder of the real tables")
    parser.add_argument("--out", type=Path, help="where to write instead (one part only)")
    found = parser.parse_args(arguments)
    found.part = found.part or [*MEASURE]
    if found.out and len(found.part) > 1:
        parser.error("--out needs one --part")
    return found


def main() -> None:
    arguments = parse(None)
    for part in arguments.part:
        machine = this_machine()
        record = {
            "part": part,
            "machine": asdict(machine),
            "revision": revision(),
            "date": datetime.date.today().isoformat(),
            **MEASURE[part](arguments, machine),
        }
        print("\n" + report(record))
        out = arguments.out or path_of(part)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record))
        print(f"\nwritten: {out}\n")


if __name__ == "__main__":
    main()
