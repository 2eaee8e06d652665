"""Peer: transformers' generate in batches of 8; ``grouped`` computes each shared prefix once, led by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import Answer, Job, LibraryEngine, run
from transformers import AutoModelForCausalLM, DynamicCache
from workload import Row, Workload

BATCH = 8


class Transformers(LibraryEngine):
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype))
        self.grouped = job.variant == "grouped"
        self.shared = Workload.load(Path(job.main)).shared_tokens

    def generate(self, rows: Sequence[Row], max_tokens: int, cache: DynamicCache | None = None) -> list[list[int]]:
        ids = torch.tensor([row.ids for row in rows])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        end = self.model.config.eos_token_id
        answers = out[:, ids.shape[1] :].tolist()
        return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]

    @torch.inference_mode()
    def answer(self, rows: Sequence[Row], max_tokens: int) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for batch in self.batches(rows):
            cache, cached = None, [0] * len(batch)
            if self.grouped:
                prefix = torch.tensor([batch[0].ids[: self.shared]])
                cache = copy.deepcopy(self.model(prefix, logits_to_keep=1, use_cache=True).past_key_values)
                cache.batch_repeat_interleave(len(batch))
                cached = [0] + [self.shared] * (len(batch) - 1)
            outputs = self.generate(batch, max_tokens, cache)
            for row, ids, found in zip(batch, outputs, cached, strict=True):
                answers[id(row)] = Answer(ids, found)
        return [answers[id(row)] for row in rows]

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        if not self.grouped:
            return [list(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        return list(groups.values())


if __name__ == "__main__":
    run(Transformers, "transformers")
