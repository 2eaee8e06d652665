"""The fused kernels alone: how near each comes to the measured bandwidth, beside the torch operations it replaces.

    python benchmarks/gpu_fused.py [--json PATH]

Each kernel is checked against its definition, then timed in a CUDA graph of calls that go round buffers larger than the
L2 cache together, as is torch's side (so without torch's launch gaps). bfloat16. "launch": time of a call on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gpu_attention import limits
from gpu_fused_cases import (
    BEYOND_CACHE,
    VOCABULARY,
    Call,
    Case,
    activation_cases,
    candidate_case,
    copies,
    norm_cases,
    normal,
    rope_case,
    sampling_cases,
)

TOKENS = (64, 4096, 8192)
SEQUENCES = (1, 64, 4096)
MODELS = {"1B": (2048, 8192, 32, 8, 64), "8B": (4096, 14336, 32, 8, 128)}  # hidden, inner, heads, kv heads, D


@dataclass
class Result:
    """us: microseconds of a call. of_copy: achieved bandwidth as a part of that of a copy."""

    kernel: str
    shape: str
    us: float
    torch_us: float
    launch_us: float
    tb_per_s: float
    of_copy: float


def seconds(calls: list[Call], repeat: int = 7) -> float:
    """Of one call: the median of replays of a graph that makes each of them equally often."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    calls[0]()
    end.record()
    torch.cuda.synchronize()
    rounds = max(1, min(400, int(4 / max(begin.elapsed_time(end), 0.01))) // len(calls))  # about 4 ms a replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(repeat):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / rounds / len(calls))
    return statistics.median(times)


def launch_seconds(call: Call, calls: int = 20) -> float:
    """CPU time of a call that waits for nothing."""
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) / calls)
        torch.cuda.synchronize()
    return best


def measure(case: Case, sets: int, bandwidth: float) -> Result:
    case.check()
    taken = seconds([case.ours(i) for i in range(sets)])
    torch_taken = float("nan") if case.theirs is None else seconds([case.theirs(i) for i in range(sets)], 3)
    rate = case.bytes / taken
    result = Result(
        case.name, case.shape, taken * 1e6, torch_taken * 1e6, launch_seconds(case.ours(0)) * 1e6, rate / 1e12,
        rate / bandwidth,
    )  # fmt: skip
    print(
        f"{case.name:22} {case.shape:34} {result.us:9.1f} us {result.tb_per_s:6.2f} TB/s {result.of_copy:6.0%} of copy"
        f"  torch {result.torch_us:9.1f} us {torch_taken / taken:6.1f}x  launch {result.launch_us:5.1f} us",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, _ = limits()
    results: list[Result] = []

    def run(cases: list[Case], size: int) -> None:
        results.extend(measure(case, copies(size), bandwidth) for case in cases)
        torch.cuda.empty_cache()

    for hidden, inner, heads, kv_heads, dim in MODELS.values():
        for tokens in TOKENS:
            run(norm_cases(tokens, hidden), tokens * hidden * 4)
            run(activation_cases(tokens, inner), tokens * inner * 4)
            width = (heads + 2 * kv_heads) * dim
            variants = ((1, False), (16, False), (1, True)) if dim == 128 else ((1, False),)
            run([rope_case(tokens, heads, kv_heads, dim, *variant) for variant in variants], tokens * width * 2)
        head = normal(VOCABULARY, hidden)
        for rows in SEQUENCES:
            run([candidate_case(rows, hidden, head)], BEYOND_CACHE)
    for rows in SEQUENCES:
        run(sampling_cases(rows), rows * VOCABULARY * 2)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"gpu": torch.cuda.get_device_name(), "copy_tb_per_s": bandwidth / 1e12}
        arguments.json.write_text(json.dumps({**machine, "results": [asdict(result) for result in results]}, indent=1))


if __name__ == "__main__":
    main()
