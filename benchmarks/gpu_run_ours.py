"""This project's engine core on the GPU benchmark's workloads; one JSON line a run. Started by gpu_engine.py."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import time
from dataclasses import asdict

import torch
from gpu_workload import WORKLOADS, in_order, orders_of, runner_arguments, write_model

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.loading import load_engine
from spark_llm.engine.request import FinishReason, Request, SamplingParams

WINDOW = 512


def run(engine: Engine, prompts: list[object], out: int, reuse: bool) -> tuple[float, list[list[int]]]:
    """Seconds from the first ``add`` to the last answer, and the answers. Rows come in windows, as from streams."""
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    answers: list[list[int]] = [[] for _ in prompts]
    begun = time.perf_counter()
    rows = enumerate(prompts)
    while True:
        for row, prompt in itertools.islice(rows, WINDOW):
            engine.add(Request(row, prompt, params, reuse=reuse))  # type: ignore[arg-type]
        if not engine.has_work():
            break
        for completion in engine.step():
            assert completion.finish_reason is FinishReason.LENGTH, completion
            answers[completion.id] = completion.output
    return time.perf_counter() - begun, answers


def main() -> None:
    parser = runner_arguments(__doc__)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--batch-tokens", type=int, default=0)
    parser.add_argument("--page-size", type=int, default=1)
    parser.add_argument("--deterministic", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    wanted = [WORKLOADS[name] for name in arguments.workloads.split(",")]
    longest = max(w.prompt + w.out for w in wanted)
    begun = time.perf_counter()
    spec = EngineSpec(
        model=f"dummy:{write_model(arguments.shape, arguments.folder)}",
        device="cuda",
        dtype="bfloat16",
        context_length=-(-longest // 64) * 64 + 64,
        quantization=arguments.quantization,
        max_batch_tokens=arguments.batch_tokens,
        page_size=arguments.page_size,
        deterministic=arguments.deterministic,
    )
    engine = load_engine(spec, text=False)
    gc.collect()
    gc.freeze()  # as the engine's process does
    name = "ours" + ("-fp8" if arguments.quantization == "fp8" else "") + ("-no-cache" if arguments.no_cache else "")
    name += "-deterministic" if arguments.deterministic else ""
    device = torch.cuda.get_device_name()
    print(json.dumps({"engine": name, "load": time.perf_counter() - begun, "device": device}), flush=True)
    run(engine, WORKLOADS["A"].prompts(seed=99)[:256], 8, reuse=True)
    for workload in wanted:
        prompts = workload.prompts()
        for order in orders_of(workload, arguments):
            engine.scheduler.cache.clear()
            before = asdict(engine.stats())
            seconds, answers = run(engine, in_order(prompts, order), workload.out, not arguments.no_cache)
            assert all(len(answer) == workload.out for answer in answers)
            after = asdict(engine.stats())
            delta = {key: after[key] - before[key] for key in after if isinstance(after[key], int | float)}
            entry = {
                "engine": name,
                "workload": workload.name,
                "order": order,
                "seconds": seconds,
                "device": device,
            }
            print(json.dumps(entry | {"cached": delta["cached_tokens"], "stats": delta}), flush=True)


if __name__ == "__main__":
    main()
