"""Several ranks answer as one process does: real processes, gloo's sums, kernels in Triton's interpreter."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from spark_llm.engine.cuda import ranks as ranks_module
from spark_llm.engine.cuda.ranks import Ranks, leave
from spark_llm.engine.cuda.runner import DeviceLostError, DeviceRunner
from spark_llm.engine.cuda.shards import Shards, check_size
from spark_llm.engine.cuda.team import Team
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool
from spark_llm.engine.model.loader import expected_shapes, iter_weights, load_config
from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.runner import Runner
from spark_llm.engine.service import process
from spark_llm.engine.service.process import ProcessId
from spark_llm.errors import LlmError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of these tests compute on the CPU")

VOCABULARY = 121  # odd: the ranks' parts of the LM head differ
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
        "attention_bias": True,
    },
    "qwen2": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
}  # fmt: skip
PAGES = 8


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
    """Rows below one prefix, one of them drawn at random, and one whose prompt is cut."""
    draw = np.random.default_rng(0)
    words = lambda count: draw.integers(2, VOCABULARY, count).astype(np.int32)  # noqa: E731
    prefix = words(9)
    prompts = [*(np.concatenate([prefix, words(1 + i)]) for i in range(3)), words(16)]
    return [
        Request(i, prompt, SamplingParams(max_tokens=4, temperature=1.2 * (i == 1), top_k=30, top_p=0.9), seed=i)
        for i, prompt in enumerate(prompts)
    ]


def answer(engine: Engine, asked: list[Request]) -> dict[int, list[int]]:
    for request in asked:
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
    expected = answer(alone, requests())
    assert len({tuple(output) for output in expected.values()}) > 3, "answers tell prompts apart"
    assert answer(together, requests()) == expected
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
        answer(together, requests())


def test_kv_heads_that_are_fewer_than_ranks(model: Callable[[str], str], teams: list[Team]) -> None:
    """With tied embeddings and biases of q, k and v."""
    spec = spec_of(model("qwen2"), 2)
    config = load_config(source := resolve(spec.model))
    decoder = Decoder(config, iter_weights(source, torch.float32, config), torch.float32, spec.context_length)
    on_cpu = Runner(decoder, KVPool(config, PAGES * spec.page_size, torch.float32), spec.page_size)
    one, two = Engine(spec, on_cpu, CacheManager(PAGES, spec.page_size), None, "float32"), start(spec, teams)
    asked = lambda: [request for request in requests() if not request.params.temperature][:2]  # noqa: E731
    assert answer(two, asked()) == answer(one, asked())
    runner: Any = two.runner
    assert isinstance(runner, DeviceRunner)
    assert runner.pool.k.shape[2] == 1


def test_a_rank_that_cannot_load_tells_why(teams: list[Team], tmp_path: Path) -> None:
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
    with subprocess.Popen(
        [sys.executable, str(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        found = [ProcessId(*map(int, text.split("-"))) for text in run.stdout.readline().split()]
        assert len(found) == 2
        assert all(rank.alive for rank in found)
        run.kill()
        for rank in found:
            with process.watching(rank) as watch:
                assert watch.wait(10.0)


class FakeMeeting:
    """Ranks that are threads: what each hands in, all get."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._there = threading.Barrier(size, timeout=10.0)
        self._parts: dict[int, torch.Tensor] = {}
        self._rank = threading.local()

    def run(self, compute: Callable[[Ranks], torch.Tensor], ordered: bool = False) -> list[torch.Tensor]:
        """What every rank computed."""

        def alone(rank: int) -> torch.Tensor:
            self._rank.number = rank
            return compute(Ranks(rank, self._size, ordered=ordered))

        with ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(alone, range(self._size)))

    def gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        self._parts[self._rank.number] = part
        self._there.wait()
        out.copy_(torch.cat([self._parts[rank] for rank in range(self._size)]))
        self._there.wait()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_draw_from_the_whole_vocabulary(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = FakeMeeting(size)
    monkeypatch.setattr(ranks_module, "_gather", meeting.gather)
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits[0, [70, 20, 110]] = 9.0  # the first of equals is the answer
    logits[1, 3] = float("nan")
    logits[2, :100] = float("nan")  # all that the first ranks have
    config = shape(vocab_size=VOCABULARY)

    def greatest(ranks: Ranks) -> torch.Tensor:
        part = logits[:, Shards(config, ranks.rank, ranks.size).vocabulary]
        own = part.float().nan_to_num(-torch.inf).argmax(1).int()
        return ranks.greatest(part, own, VOCABULARY)

    expected = logits.float().nan_to_num(-torch.inf).argmax(1).int()
    assert expected[0] == 20
    for found in meeting.run(greatest):
        assert torch.equal(found, expected)
    for found in meeting.run(
        lambda ranks: ranks.whole(logits[:, Shards(config, ranks.rank, ranks.size).vocabulary], VOCABULARY)
    ):
        assert torch.equal(found.nan_to_num(1e6), logits.nan_to_num(1e6))
        assert found.is_contiguous()


def test_the_deterministic_mode_adds_ranks_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = FakeMeeting(4)
    monkeypatch.setattr(ranks_module, "_gather", meeting.gather)
    parts = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    for found in meeting.run(lambda ranks: ranks.sum(parts[ranks.rank].clone()), ordered=True):
        assert torch.equal(found, expected)


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
def test_the_parts_make_up_the_whole(size: int) -> None:
    """For each kind of tensor; K/V heads are held twice where there are more ranks than heads."""
    config = shape()
    check_size(config, size, "none")
    for name, whole in expected_shapes(config).items():
        cells = np.zeros(whole, int)
        for rank in range(size):
            cells[Shards(config, rank, size)(name)] += 1
        module = name.split(".")[-2]
        copies = 1 if module.endswith(("_proj", "lm_head")) else size
        if module in ("k_proj", "v_proj"):
            copies = max(1, size // config.num_kv_heads)
        assert (cells == copies).all(), name


def test_a_rank_reads_its_part_of_the_files(model: Callable[[str], str]) -> None:
    source = resolve(model("llama"))
    config = load_config(source)
    whole = dict(iter_weights(source, torch.float32, config))
    for rank in range(2):
        shards = Shards(config, rank, 2)
        for name, part in iter_weights(source, torch.float32, config, part=shards):
            assert torch.equal(part, whole[name][shards(name)]), name
