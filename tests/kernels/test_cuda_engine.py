"""The whole engine with the GPU's runner, kernels and all, answers as the CPU's does, token by token."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.cuda import runner as runner_module
from spark_llm.engine.cuda.attention_plan import Layout, lay_out
from spark_llm.engine.cuda.decoder import DeviceDecoder
from spark_llm.engine.cuda.linear import DenseLinear, InvariantLinear, MakeLinear
from spark_llm.engine.cuda.load import layout_for
from spark_llm.engine.cuda.pool import DevicePool
from spark_llm.engine.cuda.runner import DevicePending, DeviceRunner
from spark_llm.engine.cuda.shards import Shards
from spark_llm.engine.cuda.weights import DeviceWeights
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool
from spark_llm.engine.model.loader import iter_weights, load_config
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.runner import Runner, poison

CONTEXT, LANES, VOCABULARY = 128, 8, 120
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1},  # with biases
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},  # with head norms
}


@dataclass
class Model:
    """Random weights, wide, so that attention is sharp and answers hang on each token."""

    config: ModelConfig
    weights: dict[str, Tensor]

    def copies(self) -> Any:
        return ((name, tensor.clone()) for name, tensor in self.weights.items())

    def cpu_engine(self, page_size: int = 1) -> Engine:
        decoder = Decoder(self.config, self.copies(), torch.float32, CONTEXT)
        runner = Runner(decoder, KVPool(self.config, 1024, torch.float32), page_size)
        return Engine(
            EngineSpec(page_size=page_size), runner, CacheManager(1024 // page_size, page_size), None, "float32"
        )

    def device_engine(
        self, device: str, *, page_size: int = 1, slots: int = 1024, cascade: bool = True, batch: int = 32,
        linear: MakeLinear = DenseLinear, most_results: int | None = None, graphs: bool = True,
    ) -> Engine:  # fmt: skip
        place = torch.device(device)
        weights = DeviceWeights(Shards(self.config), self.copies(), torch.float32, place, layer=linear, head=linear)
        layout = replace(
            layout_for(self.config, place, page_size=page_size, cascade=cascade), min_shared=4,
            min_saved=0, split_keys=8, multiprocessors=8,
        )  # fmt: skip
        decoder = DeviceDecoder(
            self.config, weights, context_length=CONTEXT, dtype=torch.float32, device=place,
            tiles=(layout.own_tile, layout.shared_tile),
        )  # fmt: skip
        pages = slots // page_size
        pool = DevicePool(
            self.config, pages=pages, page_size=page_size, lanes=LANES, context_length=CONTEXT, dtype=torch.float32,
            device=place,
        )  # fmt: skip
        runner = DeviceRunner(decoder, pool, layout, graphs=graphs, most_results=most_results)
        runner.prepare()
        spec = EngineSpec(
            page_size=page_size, max_batch_tokens=batch, max_running_rows=LANES, context_length=CONTEXT,
            check_invariants=True,
        )  # fmt: skip
        return Engine(spec, runner, CacheManager(pages, page_size), None, "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            shape = SIZES | MODELS[name] | {"architectures": [f"{name.capitalize()}ForCausalLM"], "model_type": name}
            (folder / "config.json").write_text(json.dumps(shape))
            source = resolve(f"dummy:{folder}")
            config = load_config(source)
            draw = torch.Generator().manual_seed(len(name))
            weights = {
                name: 0.4 * torch.randn(tensor.shape, generator=draw) + (0 if tensor.dim() > 1 else 0.7)
                for name, tensor in iter_weights(source, torch.float32, config)
            }
            made[name] = Model(config, weights)
        return made[name]

    return make


def requests(rows: int, tokens: int, **options: Any) -> list[Request]:
    """Prompts under two prefixes, one of which begins as the other; the last one fills a step alone."""
    draw = np.random.default_rng(0)

    def words(count: int) -> np.ndarray:
        return draw.integers(2, VOCABULARY, count).astype(np.int32)

    first, more = words(10), words(8)
    prompts = [
        np.concatenate([first, more, words(1 + i)] if i % 2 else [first, words(1 + i // 2)]) for i in range(rows - 1)
    ]
    return [
        Request(i, prompt, SamplingParams(max_tokens=tokens, **options), seed=i)
        for i, prompt in enumerate([*prompts, words(34)])
    ]


def answer(engine: Engine, asked: list[Request]) -> dict[int, list[int]]:
    """Free pages are NaN in every step: whoever reads a page that is not his answers nonsense."""
    for request in asked:
        engine.add(request)
    found: dict[int, list[int]] = {}
    cache = engine.scheduler.cache
    pages = np.arange(cache.pool.total, dtype=np.int32)
    while engine.has_work():
        runner: Any = engine.runner
        if isinstance(runner, DeviceRunner):
            poison(runner.pool, pages[cache.pool.is_free(pages)], cache.page_size)  # type: ignore[arg-type]
        for completion in engine.step():
            assert completion.error is None, completion
            found[completion.id] = completion.output
    assert cache.tree.protected == 0
    return found


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"page_size": 4}),
        ("llama", {"page_size": 1, "cascade": False}),
        ("qwen2", {"page_size": 1}),
        ("qwen3", {"page_size": 16}),
    ],
)
def test_answers_are_those_of_the_cpu(
    model: Callable[[str], Model], name: str, settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts: list[Layout] = []

    def recorded(*arguments: Any) -> Layout:
        layouts.append(lay_out(*arguments))
        return layouts[-1]

    monkeypatch.setattr(runner_module, "lay_out", recorded)
    tested = model(name)
    expected = answer(tested.cpu_engine(), requests(6, 3))
    assert len({tuple(output) for output in expected.values()}) > 3, "answers tell prompts apart"
    assert answer(tested.device_engine(device, **settings), requests(6, 3)) == expected
    assert any(len(layout.long) for layout in layouts)
    assert any(len(layout.shared) for layout in layouts) is settings.get("cascade", True)


@pytest.mark.parametrize("where", ["sampling", "waiting"])
def test_a_failed_step_leaves_no_trace(
    model: Callable[[str], Model], where: str, device: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Pages are few, so that rows are preempted and chunks cut as well."""
    caplog.set_level(logging.CRITICAL, "spark_llm")
    tested = model("llama")
    engine = tested.device_engine(device, page_size=4, slots=48, batch=24)
    runner: Any = engine.runner
    owner, method = (runner._sampler, "sample") if where == "sampling" else (DevicePending, "tokens")
    original = getattr(owner, method)
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*arguments)
        if calls in (2, 5):
            raise RuntimeError("injected")
        return result

    monkeypatch.setattr(owner, method, failing)
    assert answer(engine, requests(4, 3)) == answer(tested.cpu_engine(), requests(4, 3))
    assert engine.stats().failed_steps == 2
    assert engine.stats().preemptions > 0


def test_draws_do_not_hang_on_the_batch(model: Callable[[str], Model], device: str) -> None:
    asked = lambda: requests(3, 2, temperature=1.5, top_k=40)  # noqa: E731
    tested = model("qwen2")
    together = answer(tested.device_engine(device), asked())
    alone: dict[int, list[int]] = {}
    engine = tested.device_engine(device, cascade=False)
    for request in asked():
        alone |= answer(engine, [request])
    assert together == alone


def test_the_deterministic_mode_answers_the_same(model: Callable[[str], Model], device: str) -> None:
    tested = model("qwen2")
    engine = tested.device_engine(device, cascade=False, linear=InvariantLinear)
    assert answer(engine, requests(3, 2)) == answer(tested.cpu_engine(), requests(3, 2))


def test_a_step_without_room_for_partial_results_has_none(
    model: Callable[[str], Model], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = model("qwen2")
    parts: list[Any] = []
    forward = DeviceDecoder.forward

    def recorded(decoder: DeviceDecoder, step: Any, pool: DevicePool) -> Any:
        parts.append(step.parts)
        return forward(decoder, step, pool)

    monkeypatch.setattr(DeviceDecoder, "forward", recorded)
    engine = tested.device_engine(device, most_results=0, graphs=False)  # graphs have room of their own
    assert answer(engine, requests(4, 2)) == answer(tested.cpu_engine(), requests(4, 2))
    assert parts
    assert all(part is None for part in parts)
