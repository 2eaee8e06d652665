"""The solver of prefix order: how close to the optimum on small tables, what large ones share, how long it takes.

    .venv/bin/python benchmarks/reorder_solver.py [--csv FILE ...]

Small tables are solved exactly by the oracle (OPHR). Large ones are compared with one field order by statistics and
with GGR, by its published settings and with its stops off. GGR here counts dictionary codes with numpy; the published
code is slower. Seconds are CPU seconds of one thread, the best of several runs, from a DataFrame to rows of cells.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import Machine, this_machine
from reorder_tables import LARGE, SMALL, large_table, read_table, small_table

from spark_llm.optimizer.reorder import solve
from spark_llm.optimizer.reorder.codes import CodedTable, encode
from spark_llm.optimizer.reorder.ggr import ggr_cells
from spark_llm.optimizer.reorder.groups import fixed_order
from spark_llm.optimizer.reorder.measure import measure_coded, phc
from spark_llm.optimizer.reorder.oracle import ophr
from spark_llm.optimizer.reorder.solver import Solution, prefix_rows, solve_cells

GROWTH = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SPEED = {"reviews": 30_000, "wide": 10_000}
# GGR without its stops counts every group anew: beyond this many cells it does not end in a minute.
UNSTOPPED_CELLS = 300_000
OUT = Path(__file__).resolve().parent.parent / "artifacts" / "reorder_solver.json"


@dataclass(frozen=True)
class Closeness:
    """PHC by OPHR's on ``tables`` small tables of one kind: mean, 5th percentile, least; and GGR's mean, stops off."""

    kind: str
    tables: int
    mean: float
    low: float
    least: float
    ggr_mean: float
    milliseconds: float


@dataclass(frozen=True)
class Shared:
    """What one method shares of a large table: squared characters and the share of characters; CPU seconds to order."""

    table: str
    method: str
    phc: float
    phr: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """CPU seconds of ``solve`` on a DataFrame."""

    table: str
    rows: int
    fields: int
    seconds: float


def closeness(kind: str, tables: int) -> Closeness:
    rng = np.random.default_rng(sum(map(ord, kind)))
    ours, theirs, seconds = [], [], 0.0
    for _ in range(tables):
        rows = small_table(kind, rng)
        table = pd.DataFrame([dict(row) for row in rows])
        best = ophr(rows).phc
        started = time.process_time()
        schedule = solve(table)
        seconds += time.process_time() - started
        coded = encode(table)
        greedy = shared("", "", coded, lambda cells, lengths: ggr(cells, lengths, stops=False))
        ours.append(phc(schedule) / best if best else 1.0)
        theirs.append(greedy.phc / best if best else 1.0)
    low = float(np.quantile(ours, 0.05))
    milliseconds = 1000 * seconds / tables
    return Closeness(kind, tables, float(np.mean(ours)), low, min(ours), float(np.mean(theirs)), milliseconds)


def one_order(cells: Any, lengths: Any) -> Solution:
    orders = np.tile(fixed_order(cells, lengths * lengths), (len(cells), 1))
    return Solution(prefix_rows(cells, orders), orders)


def ggr(cells: Any, lengths: Any, *, stops: bool) -> Solution:
    if stops:
        return ggr_cells(cells, lengths)
    return ggr_cells(cells, lengths, row_depth=None, column_depth=None, stop_below=0, last_above=1)


METHODS: dict[str, Callable[[Any, Any], Solution]] = {
    "one order by statistics": one_order,
    "GGR, published settings": lambda cells, lengths: ggr(cells, lengths, stops=True),
    "GGR, stops off": lambda cells, lengths: ggr(cells, lengths, stops=False),
    "ours": solve_cells,
}


def shared(table: str, method: str, coded: CodedTable, order: Callable[[Any, Any], Solution]) -> Shared:
    started = time.process_time()
    found = order(coded.cells, coded.lengths)
    seconds = time.process_time() - started
    measured = measure_coded(coded.cells, coded.lengths[coded.cells], found.rows, found.orders)
    return Shared(table, method, measured.phc, measured.phr, seconds)


def compare(name: str, table: pd.DataFrame) -> list[Shared]:
    """All methods on a table, with values alone and with labels."""
    found = []
    for suffix, render in (("values alone", None), ("with labels", lambda field, value: f'{field}: "{value}"\n')):
        coded = encode(table, None, render)
        for method, order in METHODS.items():
            if method != "GGR, stops off" or coded.cells.size <= UNSTOPPED_CELLS:
                found.append(shared(f"{name}, {suffix}", method, coded, order))
    return found


def timed(name: str, rows: int, repeats: int) -> Speed:
    table = large_table(name, rows)
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        solve(table)
        seconds.append(time.process_time() - started)
    return Speed(name, rows, table.shape[1], min(seconds))


def report(record: dict[str, Any]) -> str:
    """A run as text, from its JSON record."""
    lines = [f"{Machine(**record['machine'])}", "", "tables of 8 x 4   tables    mean  5th pct   least  GGR mean   ms"]
    lines += [
        f"{c['kind']:<16}  {c['tables']:>6,}  {c['mean']:>6.2%}  {c['low']:>7.2%}  {c['least']:>6.1%}"
        f"  {c['ggr_mean']:>8.2%}  {c['milliseconds']:>3.1f}"
        for c in record["closeness"]
    ]
    lines += ["", f"{'table':<28}  {'method':<24}  {'PHC':>9}  {'PHR':>6}  seconds"]
    lines += [
        f"{s['table']:<28}  {s['method']:<24}  {s['phc']:>9.3g}  {s['phr']:>6.1%}  {s['seconds']:>7.2f}"
        for s in record["shared"]
    ]
    lines += ["", "table         rows  fields  seconds  us/row"]
    lines += [
        f"{s['table']:<8}  {s['rows']:>8,}  {s['fields']:>6}  {s['seconds']:>7.2f}"
        f"  {1e6 * s['seconds'] / s['rows']:>6.1f}"
        for s in record["speed"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000, help="small tables of each kind")
    parser.add_argument("--csv", nargs="*", default=[], help="tables to compare the methods on, too")
    parser.add_argument("--growth", type=int, nargs="*", default=GROWTH)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    machine = asdict(this_machine())
    large = {name: large_table(name) for name in LARGE} | {Path(p).stem: read_table(p) for p in arguments.csv}
    speed = [timed(name, rows, arguments.repeats) for name, rows in SPEED.items()]
    speed += [timed("reviews", rows, 1) for rows in arguments.growth]
    record = {
        "machine": machine,
        "closeness": [asdict(closeness(kind, arguments.tables)) for kind in SMALL],
        "shared": [asdict(found) for name, table in large.items() for found in compare(name, table)],
        "speed": [asdict(found) for found in speed],
    }
    print(report(record))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record))
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
