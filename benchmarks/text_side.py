"""Text to ids and back for many rows, without a model: what feeds the engine, and how many rows a second it can.

    .venv/bin/python benchmarks/text_side.py

100,000 rows of about 600 tokens below 128 distinct prefixes, in record batches as tasks send them. Beside it the plain
way, each whole prompt through the tokenizer, on a tenth of the rows. The rates to stand up to are those of a GPU: see
docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from machine import this_machine

from spark_llm.datasets import load
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service.protocol import StreamOpen
from spark_llm.engine.text.pipeline import TextPipeline

OUT = Path(__file__).resolve().parent.parent / "artifacts" / "text_side.json"
PREFIX_CHARACTERS, OWN_CHARACTERS = 2400, 280
OUTPUT_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--prefixes", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4096)
    arguments = parser.parse_args()
    text = TextPipeline.load(resolve("default"))
    reviews = " ".join(load("movies")["reviews"]["quote"].astype(str))
    rng = np.random.default_rng(0)

    def piece(characters: int) -> str:
        at = int(rng.integers(0, len(reviews) - characters))
        return reviews[at : at + characters] + "\n"

    prefixes = [piece(PREFIX_CHARACTERS) for _ in range(arguments.prefixes)]
    batches = []
    for start in range(0, arguments.rows, arguments.batch):
        rows = range(start, min(start + arguments.batch, arguments.rows))
        used = sorted({row * arguments.prefixes // arguments.rows for row in rows})
        texts = ["Is this review positive?\n", *(prefixes[p] for p in used), *(piece(OWN_CHARACTERS) for _ in rows)]
        codes = [
            (0, 1 + used.index(row * arguments.prefixes // arguments.rows), 1 + len(used) + i)
            for i, row in enumerate(rows)
        ]
        batches.append(_batch(texts, codes))
    header = StreamOpen(params=SamplingParams(max_tokens=OUTPUT_TOKENS), instruction_segments=1)
    text.encode(header, batches[0].slice(0, 8))

    begun, cpu = time.perf_counter(), time.process_time()
    tokens = 0
    for batch in batches:
        prompts, _ = text.encode(header, batch)
        tokens += sum(map(len, prompts))
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu

    whole = [row for batch in batches[: max(1, len(batches) // 10)] for row in _whole(batch)]
    begun = time.perf_counter()
    for start in range(0, len(whole), arguments.batch):
        text._tokenizer.encode_batch(whole[start : start + arguments.batch])
    whole_seconds = time.perf_counter() - begun

    outputs = [rng.integers(100, 40_000, OUTPUT_TOKENS).tolist() for _ in range(arguments.batch)]
    begun = time.perf_counter()
    for _ in range(10):
        text.decode(outputs)
    decode_seconds = (time.perf_counter() - begun) / 10

    result = {
        "machine": str(this_machine()),
        "rows": arguments.rows,
        "tokens_a_row": tokens / arguments.rows,
        "encode_rows_per_second": arguments.rows / seconds,
        "encode_busy_cores": cpu_seconds / seconds,
        "whole_rows_per_second": len(whole) / whole_seconds,
        "decode_rows_per_second": arguments.batch / decode_seconds,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1))
    print(result["machine"])
    print(f"{arguments.rows:,} rows of {result['tokens_a_row']:.0f} tokens below {arguments.prefixes} prefixes")
    rate = result["encode_rows_per_second"]
    print(f"  segments to ids        {rate:10,.0f} rows/s on {cpu_seconds / seconds:.1f} cores")
    print(f"  whole prompts to ids   {result['whole_rows_per_second']:10,.0f} rows/s, on {len(whole):,} rows")
    print(f"  answers to text        {result['decode_rows_per_second']:10,.0f} rows/s")


def _batch(texts: list[str], codes: list[tuple[int, ...]]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *map(len, codes)]).astype(np.int32)
    flat = np.array([code for row in codes for code in row], np.int32)
    dictionary = pa.DictionaryArray.from_arrays(pa.array(flat), pa.array(texts))
    segments = pa.ListArray.from_arrays(pa.array(offsets), dictionary)
    return pa.record_batch({"segments": segments})


def _whole(batch: pa.RecordBatch) -> list[str]:
    column = batch.column("segments")
    texts = column.values.dictionary.to_pylist()
    codes = column.values.indices.to_numpy()
    offsets = column.offsets.to_numpy()
    return ["".join(texts[c] for c in codes[a:b]) for a, b in itertools.pairwise(offsets)]


if __name__ == "__main__":
    main()
