"""The engine on a GPU beside vLLM and beside what the GPU can do at best: one table.

    python benchmarks/gpu_engine.py --shapes 1b --workloads A,B
    python benchmarks/gpu_engine.py --shapes 8b --engines floor,ours,ours-fp8,ours-no-cache,vllm

Rows of token ids, weights at random, greedy answers of fixed length, warm, the prefix cache emptied before each run;
the best of the runs, as the first one of a workload still meets shapes for which libraries choose their kernels. vLLM
runs with its own defaults and prefix caching on, if it is installed. Results are merged into artifacts/gpu_engine.json,
so that parts may be run one after the other; ratios are of engines on one GPU.

The floor: tokens that a perfect prefix cache computes, through the linear layers alone at the rate measured in the same
run, and the LM head once a sampled token; K/V bytes: what decoding must read, each distinct page once a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_workload import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "artifacts" / "gpu_engine.json"
ENGINES = {
    "floor": ["gpu_run_floor.py"],
    "ours": ["gpu_run_ours.py"],
    "ours-fp8": ["gpu_run_ours.py", "--quantization", "fp8"],
    "ours-deterministic": ["gpu_run_ours.py", "--deterministic"],
    "ours-no-cache": ["gpu_run_ours.py", "--no-cache"],
    "vllm": ["gpu_run_vllm.py"],
    "vllm-no-cache": ["gpu_run_vllm.py", "--no-cache"],
}
TARGETS = {
    "8b": {"A": 1.10, "B": 1.10, "C": 1.7, "D": 1.2, "E": 0.95},
    "1b": {"A": 2.0, "B": 1.6, "C": 2.0, "E": 1.0},
}

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--workloads", default="A,B,C,D,E")
    parser.add_argument("--engines", default="floor,ours,vllm")
    parser.add_argument("--orders", default="sorted,shuffled")
    parser.add_argument("--shuffled", default="A,B,C,D,E", help="workloads that run shuffled too, if that is asked for")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--once", default="", help="workloads that run only once, as they are long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--python", default=sys.executable, help="of the environment that vLLM is in")
    arguments = parser.parse_args()
    results: list[Result] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for shape in arguments.shapes.split(","):
        for engine in arguments.engines.split(","):
            found = run(engine, shape, arguments)
            results = [r for r in results if not _replaced(r, shape, engine, found)] + found
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1))
    print(report(results))


def _replaced(old: Result, shape: str, engine: str, found: list[Result]) -> bool:
    keys = {(r.get("workload"), r.get("order")) for r in found}
    return (old["shape"], old["engine"]) == (shape, engine) and (old.get("workload"), old.get("order")) in keys


def run(engine: str, shape: str, arguments: argparse.Namespace) -> list[Result]:
    """What the engine's runner printed; empty, with its last lines shown, if it failed."""
    script, *options = ENGINES[engine]
    python = arguments.python if engine.startswith("vllm") else sys.executable
    command = [python, str(HERE / script), "--shape", shape, *options]
    if engine != "floor":
        command += ["--workloads", arguments.workloads, "--orders", arguments.orders, "--repeat", str(arguments.repeat)]
        command += ["--shuffled", arguments.shuffled, "--once", arguments.once]
    environment = dict(os.environ)
    if engine.startswith("ours"):  # not for peers: transformers would take our folder ``kernels`` for a package
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print(shape, json.dumps(line), flush=True)
    if done.returncode:
        print(f"{shape} {engine} failed with {done.returncode}:\n" + done.stderr[-3000:], flush=True)
    return [line | {"shape": shape, "engine": engine} for line in lines]


def report(results: list[Result]) -> str:
    """The table, and the targets met and missed."""
    lines: list[str] = []
    for shape in dict.fromkeys(r["shape"] for r in results):
        mine = [r for r in results if r["shape"] == shape]
        floor = next((r for r in mine if r["engine"] == "floor"), None)
        if floor:
            lines.append(
                f"{shape} on {floor['device']}, torch {floor['torch']}: linear layers "
                f"{floor['tokens_per_second']:,.0f} tokens/s ({floor['tflops']:.0f} TFLOP/s), "
                f"copy {floor['copy_bytes_per_second'] / 1e12:.2f} TB/s"
            )
        lines.append(
            f"{'':3}{'order':10}{'engine':20}{'seconds':>9}{'rows/s':>9}{'of floor':>9}{'K/V s':>7}"
            f"{'x vllm':>8}{'cached':>8}"
        )
        for workload in WORKLOADS.values():
            for order in ("sorted", "shuffled"):
                lines += _rows(shape, workload, order, mine, floor)
    return "\n".join(lines)


def _rows(shape: str, workload: Workload, order: str, results: list[Result], floor: Result | None) -> list[str]:
    runs: dict[str, list[Result]] = {}
    for result in results:
        if (result.get("workload"), result.get("order")) == (workload.name, order):
            runs.setdefault(result["engine"], []).append(result)
    devices = {result["device"] for found in runs.values() for result in found if "device" in result}
    if len(devices) > 1:
        return [f"{workload.name:3}{order:10}runs on several GPUs, which do not compare: {', '.join(sorted(devices))}"]
    seconds = {engine: min(r["seconds"] for r in found) for engine, found in runs.items()}
    lines = []
    for engine, taken in seconds.items():
        share = f"{_floor(workload, floor) / taken:9.0%}" if floor else f"{'':9}"
        reads = f"{_kv_seconds(workload, floor):7.2f}" if floor else f"{'':7}"
        ratio = f"{seconds['vllm'] / taken:7.2f}x" if "vllm" in seconds and engine != "vllm" else f"{'':8}"
        cached = runs[engine][-1]["cached"] / (workload.rows * workload.prompt)
        lines.append(
            f"{workload.name:3}{order:10}{engine:20}{taken:9.2f}{workload.rows / taken:9.0f}{share}{reads}"
            f"{ratio}{cached:8.1%}"
        )
    target = TARGETS.get(shape, {}).get(workload.name)
    if target and {"ours", "vllm"} <= seconds.keys():
        ratio_now = seconds["vllm"] / seconds["ours"]
        lines.append(
            f"   {'met ' if ratio_now >= target else 'MISS'} ours {ratio_now:.2f}x vLLM (target {target:.2f}x)"
        )
    return lines


def _floor(workload: Workload, floor: Result) -> float:
    """Seconds of the linear layers on the tokens that must be computed, and of the LM head on those sampled."""
    layers: float = workload.unique_tokens / floor["tokens_per_second"]
    head: float = workload.rows * workload.out * floor["head_seconds_per_row"]
    return layers + head


def _kv_seconds(workload: Workload, floor: Result) -> float:
    """Seconds of reading K/V while decoding: own tokens of each row, and each prefix once a step."""
    steps = workload.out - 1
    own = workload.rows * sum(workload.own + step for step in range(steps))
    shared = steps * sum(count * length for count, length in workload.levels)
    seconds: float = (own + shared) * floor["kv_bytes_per_token"] / floor["copy_bytes_per_second"]
    return seconds


if __name__ == "__main__":
    main()
