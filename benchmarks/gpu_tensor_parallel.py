"""One model on one GPU and shared out among several: the same float32 tokens, and rows a second.

    python benchmarks/gpu_tensor_parallel.py
    python benchmarks/gpu_tensor_parallel.py --ranks 1,2,4 --shape 8b --part speed

exact: a small model of random weights in float32, greedy and drawn answers, CUDA graphs and all, beside one GPU's; then
a rank is killed: how long until the engine says so. speed: workloads A and E of gpu_engine.py at a quarter of their
rows, bfloat16, weights at random, warm, the prefix cache emptied before each run, the best of two. Results are merged
into artifacts/gpu_tensor_parallel.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_run_ours import run
from gpu_workload import FOLDER, WORKLOADS, Workload, write_model
from safetensors.torch import save_file

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.cuda.team import DeviceLostError
from spark_llm.engine.loading import load_engine
from spark_llm.engine.model.loader import expected_shapes, load_config
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import Request, SamplingParams

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "gpu_tensor_parallel.json"
SCALED = {
    "A": replace(WORKLOADS["A"], rows=1024, levels=((32, 512),)),
    "E": replace(WORKLOADS["E"], rows=256),
}
EXACT = Workload("exact", "4 prefixes x 48, 16 own, 12 out", 96, ((4, 48),), 16, 12)
_VOCABULARY = 4096
_LIMIT_SECONDS = 110.0  # of one process

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--part", default="exact,speed")
    parser.add_argument("--workloads", default="A,E")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # part:ranks, in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments)
        return
    wanted = [int(ranks) for ranks in arguments.ranks.split(",")]
    if torch.cuda.device_count() < max(wanted):
        print(f"{torch.cuda.device_count()} GPUs are here, {max(wanted)} are wanted: nothing is measured")
        return
    results: list[Result] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for part in arguments.part.split(","):
        for ranks in wanted:
            found = started(part, ranks)
            settings = "bfloat16" if arguments.quantization == "none" else arguments.quantization
            settings += ", deterministic" if arguments.deterministic else ""
            key = [part, ranks, arguments.shape if part == "speed" else "", settings]
            results = [old for old in results if old["key"] != key] + [found | {"key": key}]
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1))
    print(report(results))


def started(part: str, ranks: int) -> Result:
    """What a process of this script found; ``error`` with its last lines if it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{part}:{ranks}"]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS)
        stdout, stderr, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        stdout, stderr, code = _text(error.stdout), _text(error.stderr), -1
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    seconds = time.perf_counter() - begun
    found = (lines[-1] if lines else {}) | {"part": part, "ranks": ranks, "process_seconds": seconds}
    if code or not lines:
        found["error"] = f"exit code {code}: " + stderr[-4000:]
        print(f"{part} with {ranks} ranks failed: {found['error']}", flush=True)
    shown = {key: value for key, value in found.items() if key != "answers"}
    print(json.dumps(shown), flush=True)
    return found


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def one(arguments: argparse.Namespace) -> None:
    """Runs one part and prints its JSON line; ends the process, ranks and all."""
    part, ranks = arguments.one.split(":")
    found = exact(int(ranks)) if part == "exact" else speed(int(ranks), arguments)
    print(json.dumps(found), flush=True)
    os._exit(0)


# ---- the same tokens


def exact(ranks: int) -> Result:
    spec = EngineSpec(
        model=str(_exact_model()), device="cuda", dtype="float32", context_length=128, tensor_parallel=ranks,
        kv_cache_memory=1 << 28, max_running_rows=64, max_batch_tokens=1024, check_invariants=True,
    )  # fmt: skip
    engine = load_engine(spec, text=False)
    found: Result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found["answers"] = _answers(engine)
    if ranks > 1:
        found["lost_seconds"] = _lose_a_rank(engine)
    return found


def _exact_model() -> Path:
    """Weights of wide spread, so that answers hang on each token."""
    folder = FOLDER / "exact"
    if not (folder / "model.safetensors").exists():
        shape = json.loads((write_model("tiny", FOLDER) / "config.json").read_text())
        shape |= {"vocab_size": _VOCABULARY, "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 32}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(shape | {"bos_token_id": 0, "eos_token_id": 1}))
        draw = torch.Generator().manual_seed(0)
        weights = {
            name: 0.12 * torch.randn(size, generator=draw) + (0 if len(size) > 1 else 0.9)
            for name, size in expected_shapes(load_config(resolve(f"dummy:{folder}"))).items()
        }
        save_file(weights, folder / "model.safetensors")
    return folder


def _requests() -> list[Request]:
    """Half of the rows are drawn at random."""
    prompts = [(prompt % (_VOCABULARY - 2) + 2).astype(np.int32) for prompt in EXACT.prompts()]
    return [
        Request(
            row, prompt,
            SamplingParams(max_tokens=EXACT.out, ignore_eos=True, temperature=float(row % 2), top_k=50, top_p=0.95),
            seed=row,
        )
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip


def _answers(engine: Engine) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(EXACT.rows)]
    for request in _requests():
        engine.add(request)
    while engine.has_work():
        for completion in engine.step():
            assert completion.error is None, completion
            answers[completion.id] = completion.output
    return answers


def _lose_a_rank(engine: Engine) -> float:
    """Seconds from the end of a rank, while steps are in flight, to the engine's error."""
    team = engine.runner._team  # type: ignore[attr-defined]
    engine.scheduler.cache.clear()
    for request in _requests():
        engine.add(request)
    for _ in range(4):
        engine.step()
    begun = time.perf_counter()
    os.kill(team.pids[-1], signal.SIGKILL)
    try:
        while engine.has_work():
            engine.step()
    except DeviceLostError:
        return time.perf_counter() - begun
    raise AssertionError("all rows were answered before the rank was gone")


# ---- rows a second


def speed(ranks: int, arguments: argparse.Namespace) -> Result:
    begun = time.perf_counter()
    spec = EngineSpec(
        model=f"dummy:{write_model(arguments.shape, FOLDER)}", device="cuda", dtype="bfloat16", context_length=768,
        tensor_parallel=ranks, quantization=arguments.quantization, deterministic=arguments.deterministic,
    )  # fmt: skip
    engine = load_engine(spec, text=False)
    found: Result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": arguments.shape,
        "load_seconds": time.perf_counter() - begun, "pages": engine.scheduler.cache.pool.total, "workloads": {},
    }  # fmt: skip
    run(engine, replace(WORKLOADS["A"], rows=256, levels=((8, 512),)).prompts(seed=99), 8, True)
    for name in arguments.workloads.split(","):
        workload, times = SCALED[name], []
        prompts: list[Any] = workload.prompts()
        for _ in range(2):
            engine.scheduler.cache.clear()
            seconds, answers = run(engine, prompts, workload.out, True)
            assert all(len(answer) == workload.out for answer in answers)
            times.append(seconds)
        found["workloads"][name] = {"seconds": min(times), "rows_per_second": workload.rows / min(times)}
    return found


# ---- the table


def report(results: list[Result]) -> str:
    exacts = {found["ranks"]: found for found in results if found["part"] == "exact" and "answers" in found}
    speeds = [found for found in results if found["part"] == "speed" and found.get("workloads")]
    return "\n".join([*_exact_lines(exacts), *_speed_lines(speeds)])


def _exact_lines(exacts: dict[int, Result]) -> list[str]:
    lines = []
    for ranks, found in sorted(exacts.items()):
        if ranks == 1 or 1 not in exacts:
            continue
        pairs = list(zip(found["answers"], exacts[1]["answers"], strict=True))
        for kind, of in (("greedy", pairs[::2]), ("drawn", pairs[1::2])):
            same = sum(one == other for one, other in of)
            verdict = "ok  " if same == len(of) else "MISS"
            lines.append(f"{verdict} {ranks} GPUs, float32, {kind}: {same} of {len(of)} answers are one GPU's")
        if "lost_seconds" in found:
            lines.append(f"ok   {ranks} GPUs, a rank killed: the engine ends after {found['lost_seconds']:.2f} s")
    return lines


def _speed_lines(speeds: list[Result]) -> list[str]:
    lines = []
    columns = ("GPUs", 6), ("workload", 10), ("seconds", 9), ("rows/s", 9), ("x one GPU", 11), ("K/V pages", 12)
    for shape, settings in dict.fromkeys((found["shape"], found["key"][3]) for found in speeds):
        mine = {f["ranks"]: f for f in speeds if (f["shape"], f["key"][3]) == (shape, settings)}
        lines.append(f"{shape}, {settings}, on {next(iter(mine.values()))['device']}")
        lines.append("".join(f"{name:>{width}}" for name, width in columns) + f"{'load s':>8}")
        for name in SCALED:
            alone = mine.get(1, {}).get("workloads", {}).get(name)
            for ranks, found in sorted(mine.items()):
                measured = found["workloads"].get(name)
                if measured is None:
                    continue
                rate = measured["rows_per_second"]
                ratio = f"{rate / alone['rows_per_second']:10.2f}x" if alone else f"{'':11}"
                lines.append(
                    f"{ranks:6}{name:>10}{measured['seconds']:9.2f}{rate:9.0f}{ratio}{found['pages']:12,}"
                    f"{found['load_seconds']:8.1f}"
                )
    return lines


if __name__ == "__main__":
    main()
