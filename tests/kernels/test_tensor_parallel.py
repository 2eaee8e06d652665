"""Several ranks answer as one process does: real processes, gloo's sums, kernels in Triton's interpreter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_process
import torch
from safetensors.torch import save_file

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.cuda.ranks import leave
from spark_llm.engine.cuda.runner import DeviceLostError, DeviceRunner
from spark_llm.engine.cuda.shards import Shards, check_size
from spark_llm.engine.cuda.team import Team
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.loader import expected_shapes, iter_weights, load_config
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.service import process
from spark_llm.engine.service.process import ProcessId
from spark_llm.errors import LlmError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of these tests compute on the CPU")

VOCABULARY = 121  # odd: the ranks' parts of the LM head differ
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
    "qwen2": {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
}
PAGES = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder of safetensors. Weights are wide, so that answers hang on each token."""

    def make(name: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"tensor-parallel-{name}"
        if not folder.exists():
            folder.mkdir()
            shape = SIZES | MODELS[name] | {"architectures": [f"{name.capitalize()}ForCausalLM"], "model_type": name}
            (folder / "config.json").write_text(json.dumps(shape))
            draw = torch.Generator().manual_seed(len(name))
            weights = {
                tensor: 0.4 * torch.randn(size, generator=draw) + (0 if len(size) > 1 else 0.7)
                for tensor, size in expected_shapes(load_config(resolve(f"dummy:{folder}"))).items()
            }
            save_file(weights, folder / "model.safetensors")
        return str(folder)

    return make


@pytest.fixture
def teams() -> Iterator[list[Team]]:
    """Ended with the test, whatever it found."""
    made: list[Team] = []
    yield made
    leave()
    for team in made:
        team.close()


def spec_of(model: str, size: int, **settings: Any) -> EngineSpec:
    return EngineSpec(
        model=model, tensor_parallel=size, page_size=4, max_batch_tokens=24, max_running_rows=4, context_length=64,
        check_invariants=True, **settings,
    )  # fmt: skip


def start(spec: EngineSpec, teams: list[Team]) -> Engine:
    """The engine of rank 0, or of one process."""
    team = None
    if spec.tensor_parallel > 1:
        command = (sys.executable, rank_process.__file__)
        teams.append(team := Team(spec, ["cpu"] * spec.tensor_parallel, command))
    runner = rank_process.runner_of(spec, team, PAGES)
    return Engine(spec, runner, CacheManager(runner.pool.pages, spec.page_size), None, "float32")


def requests() -> list[Request]:
    """Rows below one prefix, half of them drawn at random, and one that fills a step alone."""
    draw = np.random.default_rng(0)
    words = lambda count: draw.integers(2, VOCABULARY, count).astype(np.int32)  # noqa: E731
    prefix = words(9)
    prompts = [*(np.concatenate([prefix, words(1 + i)]) for i in range(4)), words(26)]
    return [
        Request(i, prompt, SamplingParams(max_tokens=5, temperature=1.2 * (i % 2), top_k=30, top_p=0.9), seed=i)
        for i, prompt in enumerate(prompts)
    ]


def answer(engine: Engine) -> dict[int, list[int]]:
    for request in requests():
        engine.add(request)
    found: dict[int, list[int]] = {}
    while engine.has_work():
        for completion in engine.step():
            assert completion.error is None, completion
            found[completion.id] = completion.output
    assert engine.scheduler.cache.tree.protected == 0
    return found


def test_two_ranks_answer_as_one_and_end_when_one_is_lost(model: Callable[[str], str], teams: list[Team]) -> None:
    folder = model("llama")
    alone, together = start(spec_of(folder, 1), teams), start(spec_of(folder, 2), teams)
    expected = answer(alone)
    assert len({tuple(output) for output in expected.values()}) > 3, "answers tell prompts apart"
    assert answer(together) == expected
    assert together.scheduler.cache.pool.total == PAGES, "the least of both ranks"
    assert together.stats().preemptions > 0
    assert together.stats().cached_tokens > 0

    (pid,) = teams[0].pids
    rank = ProcessId.of(pid)
    assert rank is not None
    with process.watching(rank) as watch:
        teams[0]._children[0].send_signal(signal.SIGKILL)
        assert watch.wait(10.0)
    with pytest.raises(DeviceLostError):
        answer(together)


def test_kv_heads_that_are_fewer_than_ranks(model: Callable[[str], str], teams: list[Team]) -> None:
    """In the deterministic mode, with tied embeddings and biases of q, k and v."""
    folder = model("qwen2")
    one, two = (start(spec_of(folder, size, deterministic=True), teams) for size in (1, 2))
    assert answer(two) == answer(one)
    runner: Any = two.runner
    assert isinstance(runner, DeviceRunner)
    assert runner.pool.k.shape[2] == 1


def test_a_rank_that_cannot_load_tells_why(model: Callable[[str], str], teams: list[Team], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    script = tmp_path / "rank.py"
    script.write_text(
        "from spark_llm.engine.cuda import worker\n"
        "from spark_llm.errors import LlmError\n"
        "def load(order, seat):\n"
        "    raise LlmError('LLM_MODEL_NOT_FOUND', model=order.spec.model, reason=f'rank {order.rank} has no disk')\n"
        "worker.main(load)\n"
    )
    teams.append(team := Team(spec_of("m", 2), ["cpu", "cpu"], (sys.executable, str(script))))
    with pytest.raises(LlmError, match="rank 1 has no disk") as error:
        team.least(1)
    assert error.value.condition == "LLM_MODEL_NOT_FOUND"


def test_no_rank_outlives_rank_0(tmp_path: Path) -> None:
    """Rank 0 is killed while the others wait inside of a library that knows nothing of it."""
    worker = tmp_path / "rank.py"
    worker.write_text(
        "import threading\n"
        "from spark_llm.engine.cuda import worker\n"
        "worker.main(lambda order, seat: (seat.least(1), threading.Event().wait()))\n"
    )
    first = tmp_path / "first.py"
    first.write_text(
        "import os, signal, sys\n"
        "from spark_llm.engine.config import EngineSpec\n"
        "from spark_llm.engine.cuda.team import Team\n"
        "from spark_llm.engine.service.process import ProcessId\n"
        f"team = Team(EngineSpec(), ['cpu'] * 3, (sys.executable, {str(worker)!r}))\n"
        "team.least(7)\n"
        "print(*map(ProcessId.of, team.pids), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        found = [ProcessId(*map(int, text.split("-"))) for text in run.stdout.readline().split()]
        assert len(found) == 2
        assert all(rank.alive for rank in found)
        run.kill()
        for rank in found:
            with process.watching(rank) as watch:
                assert watch.wait(10.0)


def shape(**sizes: int) -> ModelConfig:
    return ModelConfig(
        name="a model", architecture="LlamaForCausalLM", num_layers=1, rms_norm_eps=1e-5, rope_theta=1e4,
        context_length=64, **({"vocab_size": 10, "hidden_size": 32, "intermediate_size": 48, "num_heads": 8,
        "num_kv_heads": 4, "head_dim": 8} | sizes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "size", "quantization"),
    [
        (shape(), 3, "none"),
        (shape(num_heads=6, num_kv_heads=2), 4, "none"),
        (shape(num_heads=12, num_kv_heads=3), 2, "none"),
        (shape(intermediate_size=50), 4, "none"),
        (shape(), 4, "fp8"),
    ],
)
def test_a_shape_that_cannot_be_shared_out_is_named(config: ModelConfig, size: int, quantization: str) -> None:
    with pytest.raises(LlmError, match=str(config.intermediate_size)) as error:
        check_size(config, size, quantization)
    assert error.value.condition == "LLM_INVALID_CONFIG"
    assert f"{config.num_heads} heads" in str(error.value)
    assert repr(str(size)) in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_parts_make_up_the_whole(model: Callable[[str], str], size: int) -> None:
    """For each kind of tensor; K/V heads are held twice where there are more ranks than heads."""
    config = shape()
    check_size(config, size, "none")
    for name, whole in expected_shapes(config).items():
        cells = np.zeros(whole, int)
        for rank in range(size):
            cells[Shards(config, rank, size)(name)] += 1
        shared = any(part in name for part in ("q_proj", "gate_proj", "up_proj", "o_proj.w", "down_proj.w", "lm_head"))
        copies = max(1, size // config.num_kv_heads) if ".k_proj" in name or ".v_proj" in name else 1 if shared else size
        assert (cells == copies).all(), name


def test_a_rank_reads_its_part_of_the_files(model: Callable[[str], str]) -> None:
    source = resolve(model("llama"))
    config = load_config(source)
    whole = dict(iter_weights(source, torch.float32, config))
    for rank in range(2):
        shards = Shards(config, rank, 2)
        for name, part in iter_weights(source, torch.float32, config, part=shards):
            assert torch.equal(part, whole[name][shards(name)]), name
