"""What each order of rows and fields lets a prefix cache find, and how long the order takes to find."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.compute as pc
from prefix_order_hits import Hits, Ints, bounded, encode, rendered, text_columns, unbounded, with_fields
from results import aligned, judge

from spark_llm.datasets import paper
from spark_llm.engine.text.lengths import token_lengths
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.optimizer.reorder.ggr import ggr_cells
from spark_llm.optimizer.reorder.hashing import hash_values
from spark_llm.optimizer.reorder.plan_order import plan_order
from spark_llm.optimizer.reorder.solver import prefix_rows, solve_cells
from spark_llm.rendering import RenderedWindow

Floats = npt.NDArray[np.float64]

CACHE_TOKENS = 40_000  # what a GPU of 24 GB holds beside an 8B model in 16 bits, as in the paper
SAMPLED_ROWS = 10_000
SHUFFLED, WRITTEN, FIXED, GGR, SOLVED, TABLE = (
    "shuffled, as written",
    "sorted, as written",
    "fixed order, sorted",
    "GGR, published",
    "ours, solve",
    "ours, order table",
)
REAL = {"beer.csv": "beer (real)", "movies_small.csv": "movies (real)"}
SAME_TABLE = {"beer (real)": "beer", "movies (real)": "movies"}
ANY_INSTRUCTION = "Say in one word whether anything is wrong with this contract. Answer only Yes or No."


@dataclass(frozen=True)
class Case:
    """One order of one table. rows: how many of the table's were used. seconds, cpu_seconds: of the solver alone.

    hits: in a cache without bound, where rows may come in any order. held: in a cache of CACHE_TOKENS, rows in order.
    """

    table: str
    order: str
    rows: int
    seconds: float
    cpu_seconds: float
    hits: Hits
    held: Hits


@dataclass(frozen=True)
class Coded:
    """A table as the solvers see it: cells are numbers of rendered lines, lengths [cell numbers] in tokens.

    characters: the same of the values alone. dependencies: fields that the paper says determine each other.
    """

    frame: pd.DataFrame
    window: RenderedWindow
    cells: Ints
    lengths: Floats
    characters: Floats
    dependencies: list[list[int]]


def tables(names: Sequence[str], rows: int | None, data: Path | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """The generated tables, then those of ``data`` that are there."""
    for name in names:
        yield name, paper.table(name, rows)
    for file, name in REAL.items():
        if data is not None and (data / file).is_file():
            frame = pd.read_csv(data / file)
            yield name, frame if rows is None else frame.sample(min(rows, len(frame)), random_state=0)


def coded(name: str, frame: pd.DataFrame) -> Coded:
    """Render and measure a table's cells, each distinct one once. Rows are shuffled first."""
    frame = frame.sample(frac=1, random_state=1, ignore_index=True)
    known = SAME_TABLE.get(name, name)
    window = rendered(frame, paper.instruction(known) if known in paper.TABLES else ANY_INSTRUCTION)
    lengths = np.array(token_lengths("default")(window.dictionary.to_pylist()), np.float64)
    cells = window.codes[:, 1:]
    characters = np.zeros(len(lengths))
    for column, codes in zip(text_columns(frame)[0], cells.T, strict=True):
        characters[codes] = pc.fill_null(pc.utf8_length(column), 0).to_numpy(zero_copy_only=False)
    declared = paper.TABLES[known].dependencies if known in paper.TABLES else ()
    places = {field: place for place, field in enumerate(frame.columns)}
    dependencies = [[places[field] for field in group] for group in declared if set(group) <= set(places)]
    return Coded(frame, window, cells, lengths, characters, dependencies)


def run(
    pipeline: TextPipeline,
    names: Sequence[str],
    rows: int | None,
    data: Path | None,
    ggr_rows: Mapping[str, int],
    say: Callable[[str], None],
) -> list[Case]:
    """All orders of all tables; GGR on the first ``ggr_rows`` rows of the tables named there, ours beside it."""
    cases = []
    for name, frame in tables(names, rows, data):
        table = coded(name, frame)
        most = min(len(table.frame), ggr_rows.get(name, len(table.frame)))
        for order in (SHUFFLED, WRITTEN, FIXED, SOLVED, TABLE):
            cases.append(case(pipeline, name, order, table))
            say(line(cases[-1]))
        few = first(table, most)
        if most < len(table.frame):
            cases.append(case(pipeline, name, SOLVED, few))
        cases.append(case(pipeline, name, GGR, few))
        say(line(cases[-1]))
    return cases


def case(pipeline: TextPipeline, name: str, order: str, table: Coded) -> Case:
    """Find one order of a table and measure the prompts that it gives."""
    find = ORDERS[order]
    cpu, wall = time.process_time(), time.perf_counter()
    rows, fields = find(table)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    prompts = encode(pipeline, with_fields(table.window, fields)).take(rows)
    return Case(
        table=name,
        order=order,
        rows=len(rows),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        hits=unbounded(prompts),
        held=bounded(prompts, CACHE_TOKENS),
    )


def first(table: Coded, rows: int) -> Coded:
    """The first rows of a table."""
    window = replace(table.window, codes=table.window.codes[:rows])
    return replace(table, frame=table.frame.head(rows), window=window, cells=window.codes[:, 1:])


def shuffled(table: Coded) -> tuple[Ints, Ints]:
    return np.arange(len(table.cells)), as_written(table)


def written(table: Coded) -> tuple[Ints, Ints]:
    return prefix_rows(table.cells, as_written(table)), as_written(table)


def fixed(table: Coded) -> tuple[Ints, Ints]:
    """Fields by mean length² · (rows / distinct - 1), the largest first."""
    length = table.lengths[table.cells].mean(axis=0)
    distinct = np.array([len(np.unique(column)) for column in table.cells.T])
    best = np.argsort(-(length**2) * (len(table.cells) / distinct - 1), kind="stable")
    orders = np.broadcast_to(best, table.cells.shape)
    return prefix_rows(table.cells, orders), orders


def solved(table: Coded) -> tuple[Ints, Ints]:
    found = solve_cells(table.cells, table.lengths)
    return found.rows, found.orders


def planned(table: Coded) -> tuple[Ints, Ints]:
    """The order table of a sample, as Spark plans it, applied to all rows."""
    columns, _ = text_columns(table.frame)
    hashes = np.stack([hash_values(column) for column in columns], axis=1)
    sample = np.random.default_rng(0).permutation(len(hashes))[:SAMPLED_ROWS]
    lengths = table.lengths[table.cells[sample]]
    orders = plan_order(hashes[sample], lengths, total_rows=len(hashes)).table.orders(hashes)
    return prefix_rows(table.cells, orders), orders


def published(table: Coded) -> tuple[Ints, Ints]:
    """With the settings of the paper: characters, declared dependencies, early stops."""
    found = ggr_cells(table.cells, table.characters, dependencies=table.dependencies)
    return found.rows, found.orders


def as_written(table: Coded) -> Ints:
    return np.broadcast_to(np.arange(table.cells.shape[1]), table.cells.shape)


ORDERS = {SHUFFLED: shuffled, WRITTEN: written, FIXED: fixed, GGR: published, SOLVED: solved, TABLE: planned}

HEADER = (
    "table", "order", "rows", "tokens/row", "computed/row", "PHR", "data", "instruction", f"PHR, {CACHE_TOKENS:,} held",
    "solver s", "cpu s",
)  # fmt: skip


def cells_of(found: Case) -> tuple[str, ...]:
    """One line of the table."""
    hits = found.hits
    return (
        found.table,
        found.order,
        f"{found.rows:,}",
        f"{hits.tokens / hits.rows:,.0f}",
        f"{(hits.tokens - hits.found) / hits.rows:,.1f}",
        f"{hits.rate:.1%}",
        f"{hits.data_rate:.1%}",
        f"{hits.instruction_rate:.1%}",
        f"{found.held.rate:.1%}",
        f"{found.seconds:.3f}",
        f"{found.cpu_seconds:.3f}",
    )


def line(found: Case) -> str:
    """One line of the table while it grows."""
    return "  ".join(cells_of(found))


def report(record: Mapping[str, Any]) -> str:
    """The table and the targets that it can judge, from the JSON record."""
    cases = [
        Case(**{**entry, "hits": Hits(**entry["hits"]), "held": Hits(**entry["held"])}) for entry in record["solver"]
    ]
    return "\n".join([aligned([HEADER, *map(cells_of, cases)]), "", *targets(cases)])


def targets(cases: Sequence[Case]) -> list[str]:
    """Ours against GGR and the fixed order, in points of PHR, and our time against what the paper says of its code.

    The paper's seconds are of its own machine; the GGR here is a much faster program for the same schedule.
    """
    lines = []
    for name in dict.fromkeys(found.table for found in cases):
        best = {(found.order, found.rows): found for found in cases if found.table == name}
        for ggr in (found for found in best.values() if found.order == GGR):
            for ours in (best[key] for key in ((SOLVED, ggr.rows), (TABLE, ggr.rows)) if key in best):
                where = f"{name}, {ours.rows:,} rows: {ours.order}"
                lines.append(judge(f"{where} less GGR, points of PHR", points(ours, ggr), 0.0))
        for ours in (found for found in best.values() if found.order in (SOLVED, TABLE)):
            where = f"{name}, {ours.rows:,} rows: {ours.order}"
            if (FIXED, ours.rows) in best:
                gain = points(ours, best[FIXED, ours.rows])
                lines.append(judge(f"{where} less fixed order, points of PHR", gain, 0.0))
            if name in paper.TABLES and ours.order == SOLVED and ours.rows >= paper.TABLES[name].rows:
                faster = paper.TABLES[name].solver_seconds / max(ours.cpu_seconds, 1e-9)
                lines.append(judge(f"{where}: the paper's seconds of GGR by our CPU seconds", faster, 40.0))
    return lines


def points(one: Case, other: Case) -> float:
    """Percentage points between hit rates, rounded as the table shows them."""
    return round(100 * (one.hits.rate - other.hits.rate), 1)
