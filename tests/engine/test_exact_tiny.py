"""Greedy answers are those of transformers, however rows are batched, cut, cached, preempted or evicted.

Small random models of every architecture, 320 prompts that share prefixes as rows of a table do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from spark_llm.engine.model import blocks
from spark_llm.engine.model.decoder import Decoder
from spark_llm.engine.runner import poison

TinyCase = Callable[[str], Any]

ARCHITECTURES = ["llama", "llama3", "mistral", "qwen2", "qwen3"]

SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no cascade": {"cascade": False},
    "pages of 4": {"page_size": 4},
    "pages of 16": {"page_size": 16},
    "no reuse": {"reuse": False, "rows": 120},
    "no reuse, pages of 16, chunks": {"reuse": False, "page_size": 16, "batch": 33, "rows": 80},
    "one row at a time": {"running": 1, "rows": 80},
    "two rows": {"running": 2, "rows": 80},
    "seven rows": {"running": 7, "pages": 400},
    "all rows in one step": {"batch": 16_384},
    "chunks of 1": {"batch": 1, "rows": 12},
    "chunks of 2": {"batch": 2, "rows": 24, "page_size": 4},
    "chunks of page + 1": {"batch": 5, "rows": 60, "page_size": 4},
    "chunks of page + 1, pages of 16": {"batch": 17, "rows": 100, "page_size": 16},
    "chunks of page - 1": {"batch": 15, "rows": 100, "page_size": 16},
    "chunks of 64": {"batch": 64, "page_size": 4},
    "preempted every 2 steps": {"preempt_every": 2, "rows": 60, "running": 8},
    "preempted every 3 steps, chunks": {"preempt_every": 3, "batch": 13, "page_size": 4, "rows": 60},
    "preempted, no reuse": {"preempt_every": 5, "reuse": False, "rows": 60},
    "room for the longest row only": {"pages": 186, "rows": 100},
    "room for the longest row only, pages of 4": {"pages": 47, "page_size": 4, "rows": 100, "batch": 64},
    "cache emptied in each step": {"clear_every": 1, "rows": 150},
    "little room, emptied, preempted, no cascade": {
        "pages": 250,
        "clear_every": 3,
        "preempt_every": 4,
        "cascade": False,
        "batch": 50,
        "rows": 100,
    },
    "rows keep coming": {"late": 60, "rows": 150, "batch": 80},
    "a step in flight": {"depth": 2},
    "a step in flight, rows keep coming": {"depth": 2, "late": 60, "rows": 150, "batch": 80},
    "a step in flight, little room, emptied, preempted, pages of 4": {
        "depth": 2,
        "pages": 60,
        "page_size": 4,
        "clear_every": 3,
        "preempt_every": 4,
        "batch": 50,
        "rows": 100,
    },
    "a step in flight, two rows": {"depth": 2, "running": 2, "rows": 80},
}
SOME = ["as it comes", "no cascade", "chunks of page + 1, pages of 16", "little room, emptied, preempted, no cascade"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_do_not_hang_on_the_engines_settings(tiny_case: TinyCase, setting: str) -> None:
    tiny_case("llama").check(**SETTINGS[setting])


@pytest.mark.parametrize("setting", SOME)
@pytest.mark.parametrize("name", ARCHITECTURES[1:])
def test_every_architecture_answers_as_transformers_does(tiny_case: TinyCase, name: str, setting: str) -> None:
    tiny_case(name).check(**SETTINGS[setting])


def test_prefixes_were_shared_preempted_and_evicted_in_these_runs(tiny_case: TinyCase) -> None:
    """The settings above do what their names say."""
    case = tiny_case("llama")
    answers = case.check()
    cached = sum(a.cached_tokens for a in answers) / sum(a.prompt_tokens for a in answers)
    assert 0.6 < cached < 1
    assert sum(a.recomputed_tokens for a in answers) == 0
    assert all(a.cached_tokens == 0 for a in case.check(reuse=False, rows=50))
    assert sum(a.recomputed_tokens for a in case.check(preempt_every=2, running=8, rows=50)) > 20
    tight = case.check(pages=186, rows=100)
    assert sum(a.cached_tokens for a in tight) < sum(a.cached_tokens for a in answers[:100])


def test_chunks_cut_into_tiles_and_short_shared_runs(tiny_case: TinyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "QUERY_TILE", 8)
    monkeypatch.setattr(blocks, "MIN_SHARED", 2)
    tiny_case("llama").check(batch=50)
    tiny_case("mistral").check(page_size=4, cascade=False, rows=100)


def test_ends_on_every_end_token(tiny_case: TinyCase) -> None:
    """Some of the expected answers end early, so that the comparisons cover it."""
    case = tiny_case("llama")
    early = [o for o in case.expected.outputs if len(o) < case.max_tokens]
    assert early
    assert all(o[-1] in case.model.config.eos_ids for o in early)


# --- the comparison can fail


def changed(case: Any, name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    weights = dict(case.model.weights)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] += 2.0
    return case.model.decoder_of(weights, dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "weight",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_one_wrong_weight_is_noticed(tiny_case: TinyCase, weight: str) -> None:
    case = tiny_case("llama")
    engine = case.model.engine(decoder=changed(case, weight))
    with pytest.raises(AssertionError, match="differ from transformers"):
        case.check(engine=engine)


def test_one_wrong_page_is_noticed(tiny_case: TinyCase) -> None:
    """A page of the template that all rows share is overwritten between two runs on one cache."""
    case = tiny_case("llama")
    engine = case.model.engine()
    for request in case.model.requests(case.prompts[:50], 1):
        engine.add(request)
    while engine.has_work():
        engine.step()
    shared = max(engine.scheduler.cache.tree.root.children.values(), key=lambda node: len(node.children))
    poison(engine.runner.pool, shared.pages[:1], 1)
    with pytest.raises(AssertionError, match="differ from transformers"):
        case.check(engine=engine)


def test_pages_of_another_prefix_are_noticed(tiny_case: TinyCase) -> None:
    """Two branches of the tree are swapped: finite numbers, but of other tokens."""
    case = tiny_case("llama")
    engine = case.model.engine()
    for request in case.model.requests(case.prompts[:100], 1):
        engine.add(request)
    while engine.has_work():
        engine.step()
    shared = max(engine.scheduler.cache.tree.root.children.values(), key=lambda node: len(node.children))
    one, other = sorted(shared.children.values(), key=lambda node: -len(node.children))[:2]
    length = min(len(one.pages), len(other.pages))
    one.pages[:length], other.pages[:length] = other.pages[:length].copy(), one.pages[:length].copy()
    with pytest.raises(AssertionError, match="differ from transformers"):
        case.check(engine=engine)


# --- half precision, and limits


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_half_precision_arithmetic_stays_near_float32(
    tiny_case: TinyCase, name: str, dtype: torch.dtype, bound: float
) -> None:
    """Logits computed natively in bfloat16 and float16, over their own spread: 8 and 11 bits of mantissa."""
    model = tiny_case(name).model
    prompt = tiny_case(name).prompts[5]
    exact = _logits(model, model.decoder, prompt)
    near = _logits(model, model.decoder_of(model.weights, dtype), prompt)
    error = (near - exact).abs().max() / exact.std()
    assert 0 < float(error) < bound * 4
    assert float((near - exact).std() / exact.std()) < bound


def _logits(model: Any, decoder: Decoder, prompt: list[int]) -> torch.Tensor:
    engine = model.engine(decoder=decoder)
    engine.scheduler.add(model.requests([prompt], 1)[0])
    plan = engine.scheduler.plan()
    return engine.runner.decoder.forward(engine.runner._batch(plan), engine.runner.pool)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_hardly_hang_on_the_settings(tiny_case: TinyCase, dtype: torch.dtype) -> None:
    """Native half-precision arithmetic under cascade, chunks and preemption: most rows agree with the plain run."""
    case = tiny_case("llama")
    decoder = case.model.decoder_of(case.model.weights, dtype)
    requests = case.model.requests(case.prompts[:100], 4)
    plain = case.model.answer(requests, engine=case.model.engine(decoder=decoder, cascade=False))
    tight = case.model.answer(
        requests, engine=case.model.engine(decoder=decoder, batch=37, page_size=4, pages=120), preempt_every=5
    )
    same = np.mean([a.output[0] == b.output[0] for a, b in zip(plain, tight, strict=True)])
    assert same > 0.9
