"""What the GPU's accuracy benchmarks share: prompts, an engine's answers, and the logits behind them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_workload import FOLDER, SHAPES, write_model
from torch import Tensor

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.cuda.runner import DevicePending
from spark_llm.engine.loading import load_engine
from spark_llm.engine.request import Request, SamplingParams

Ints = npt.NDArray[np.int32]

PROMPTS = Path(__file__).resolve().parent.parent / "artifacts" / "gpu_prompts.json"
_INSTRUCTION = "Does the critic like the film? Answer yes or no, then say why in one sentence."


def model_of(name: str) -> str:
    """What an engine is told: a shape of gpu_workload with weights at random, or ``name`` itself."""
    return f"dummy:{write_model(name, FOLDER)}" if name in SHAPES else name


def prompts_of(name: str, count: int) -> list[Ints]:
    """Reviews below their film's plot as the demo model's chat template frames them; random ids for a shape.

    The ids are kept in artifacts/gpu_prompts.json, for machines without a tokenizer.
    """
    if name in SHAPES:
        draw = np.random.default_rng(0)
        first = draw.integers(1000, 127_000, (8, 96), dtype=np.int32)
        return [np.concatenate([first[i % 8], draw.integers(1000, 127_000, 48, dtype=np.int32)]) for i in range(count)]
    kept = json.loads(PROMPTS.read_text()) if PROMPTS.exists() else []
    if len(kept) < count:
        kept = _encode(name, count)
        PROMPTS.parent.mkdir(parents=True, exist_ok=True)
        PROMPTS.write_text(json.dumps(kept))
    return [np.array(ids, np.int32) for ids in kept[:count]]


def _encode(name: str, count: int) -> list[list[int]]:
    from spark_llm import datasets
    from spark_llm.engine.model.source import resolve
    from spark_llm.engine.text.pipeline import TextPipeline
    from spark_llm.engine.text.tokenizer import load_tokenizer

    source = resolve(name)
    frame, tokenizer = TextPipeline.load(source).frame(None), load_tokenizer(source).tokenizer
    tables = datasets.load("movies")
    rows = tables["reviews"].merge(tables["movies"], on="movie_id").sort_values(["movie_id", "review_id"])
    texts = [f"{_INSTRUCTION}\nplot: {row.plot[:600]}\nreview: {row.quote}" for row in rows.head(count).itertuples()]
    framed = [frame.prefix + text + frame.suffix for text in texts]
    return [found.ids for found in tokenizer.encode_batch(framed, add_special_tokens=False)]


def engine_of(name: str, **settings: Any) -> Engine:
    """An engine of token ids that leaves room for another one on the GPU."""
    limits: dict[str, Any] = {"kv_cache_memory": 2 << 30, "max_running_rows": 128, "context_length": 1024}
    return load_engine(EngineSpec(model=model_of(name), **(limits | settings)), text=False)


def forget(engine: Engine) -> None:
    """Frees the GPU's memory; ``engine`` must be the caller's last use of it."""
    engine.runner = None  # type: ignore[assignment]
    engine._pipeline = None  # type: ignore[assignment]
    gc.collect()
    torch.cuda.empty_cache()


def answers_of(engine: Engine, prompts: list[Ints], out: int) -> list[list[int]]:
    """Greedy answers of ``out`` tokens, computed together."""
    found: dict[int, list[int]] = {}
    params = SamplingParams(max_tokens=out, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        engine.add(Request(row, prompt, params))
    while engine.has_work():
        for completion in engine.step():
            assert completion.error is None, completion
            found[completion.id] = completion.output
    return [found[row] for row in range(len(prompts))]


def logits_of(engine: Engine, sequences: list[Ints]) -> Tensor:
    """float32 [sequences, vocabulary] on the CPU, of the token after each sequence, computed together."""
    found: dict[int, Tensor] = {}
    held: list[Tensor] = []
    runner: Any = engine.runner
    forward, launch = runner.decoder.forward, runner.launch

    def recorded(*arguments: Any, **settings: Any) -> Tensor:
        held.append(forward(*arguments, **settings))
        return held[-1]

    def launched(plan: Any) -> Any:
        pending = launch(plan)
        ids = [scheduled.row.request.id for scheduled in plan.rows if scheduled.samples]
        assert not len(plan.decode), "answers of one token do not decode"
        if ids:
            logits = held[-1].float().cpu()
            order = pending._order if isinstance(pending, DevicePending) else range(len(ids))
            found.update({row: logits[int(at)] for row, at in zip(ids, order, strict=True)})
        held.clear()
        return pending

    runner.decoder.forward, runner.launch = recorded, launched
    try:
        answers_of(engine, sequences, 1)
    finally:
        del runner.decoder.forward, runner.launch
    return torch.stack([found[row] for row in range(len(sequences))])


def extended(prompts: list[Ints], answers: list[list[int]], lengths: tuple[int, ...]) -> list[Ints]:
    """Each prompt with the first tokens of its answer, for each of ``lengths``."""
    return [
        np.concatenate([prompt, np.array(answer[:length], np.int32)])
        for length in lengths
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def compared(found: Tensor, expected: Tensor) -> dict[str, float]:
    """relative: RMS of the difference over RMS of the expected logits about their mean; largest: of all differences.

    same: share of rows in which the same token's logit is the greatest. gap_of_others: the largest distance of the two
    greatest expected logits in the rest of the rows.
    """
    difference = (found - expected).abs()
    spread = expected - expected.mean(1, keepdim=True)
    top = expected.topk(2, dim=1).values
    same = found.argmax(1) == expected.argmax(1)
    return {
        "relative": float(difference.square().mean().sqrt() / spread.square().mean().sqrt()),
        "largest": float(difference.max()),
        "same": float(same.float().mean()),
        "gap_of_others": float((top[:, 0] - top[:, 1])[~same].max()) if not same.all() else 0.0,
    }
