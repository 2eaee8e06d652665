"""Where the GPU's time goes while the engine answers a workload: kernels by name, and how long none ran.

python benchmarks/gpu_profile.py --shape 1b --workloads A,E
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from gpu_run_ours import run
from gpu_workload import FOLDER, WORKLOADS, write_model
from torch.profiler import ProfilerActivity, profile

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.loading import load_engine

SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--workloads", default="A")
    parser.add_argument("--quantization", default="none")
    arguments = parser.parse_args()
    spec = EngineSpec(
        model=f"dummy:{write_model(arguments.shape, FOLDER)}",
        device="cuda",
        dtype="bfloat16",
        context_length=2304,
        quantization=arguments.quantization,
    )
    engine = load_engine(spec, text=False)
    for name in arguments.workloads.split(","):
        workload = WORKLOADS[name]
        prompts = workload.prompts()
        run(engine, prompts, workload.out, True)
        engine.scheduler.cache.clear()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            seconds, _ = run(engine, prompts, workload.out, True)
            torch.cuda.synchronize()
        engine.scheduler.cache.clear()
        spans: list[tuple[float, float]] = []
        times: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for event in profiler.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spans.append((event.time_range.start, event.time_range.end))
                entry = times[event.name[:70]]
                entry[0] += 1
                entry[1] += (event.time_range.end - event.time_range.start) / 1e6
        busy, end = 0.0, 0.0
        for start, stop in sorted(spans):
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        span = (max(s[1] for s in spans) - min(s[0] for s in spans)) / 1e6
        print(f"\n{arguments.shape} {name}: {seconds:.2f} s profiled, GPU busy {busy / 1e6:.2f} s of {span:.2f} s")
        for kernel, (count, total) in sorted(times.items(), key=lambda item: -item[1][1])[:SHOWN]:
            print(f"  {total:7.3f} s {total / (busy / 1e6):6.1%} {count:7d} x {total / count * 1e6:8.1f} us  {kernel}")


if __name__ == "__main__":
    main()
