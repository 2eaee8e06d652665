"""vLLM on the GPU benchmark's workloads, offline and warm; one JSON line a run. Started by gpu_engine.py."""

from __future__ import annotations

import json
import os
import time

import numpy as np
from gpu_workload import WORKLOADS, in_order, orders_of, runner_arguments, write_model

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def main() -> None:
    arguments = runner_arguments(__doc__).parse_args()
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    wanted = [WORKLOADS[name] for name in arguments.workloads.split(",")]
    longest = max(w.prompt + w.out for w in wanted)
    device = torch.cuda.get_device_name()
    begun = time.perf_counter()
    llm = LLM(
        model=str(write_model(arguments.shape, arguments.folder)),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=-(-longest // 64) * 64 + 64,
        enable_prefix_caching=not arguments.no_cache,
        gpu_memory_utilization=0.9,
        seed=0,
    )
    print(json.dumps({"engine": "vllm", "version": vllm.__version__, "load": time.perf_counter() - begun}), flush=True)
    warm = [{"prompt_token_ids": p.tolist()} for p in WORKLOADS["A"].prompts(seed=99)[:256]]
    llm.generate(warm, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False), use_tqdm=False)
    for workload in wanted:
        prompts = workload.prompts()
        params = SamplingParams(temperature=0.0, max_tokens=workload.out, ignore_eos=True, detokenize=False)
        for order in orders_of(workload, arguments):
            llm.reset_prefix_cache()
            rows = [{"prompt_token_ids": p.tolist()} for p in in_order(prompts, order)]
            begun = time.perf_counter()
            answers = llm.generate(rows, params, use_tqdm=False)
            seconds = time.perf_counter() - begun
            assert all(len(a.outputs[0].token_ids) == workload.out for a in answers)
            cached = float(np.sum([a.num_cached_tokens or 0 for a in answers]))
            run = {
                "workload": workload.name,
                "order": order,
                "seconds": seconds,
                "cached": cached,
                "device": device,
            }
            print(json.dumps({"engine": "vllm-no-cache" if arguments.no_cache else "vllm"} | run), flush=True)


if __name__ == "__main__":
    main()
