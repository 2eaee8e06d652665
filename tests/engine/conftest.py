"""Small random models of every architecture, and the packaged one, each beside transformers' own.

``ModelPair`` answers prompts with the engine under any setting; ``Reference`` holds what transformers.generate
answers and checks that answers are the same.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.model.config import ModelConfig
from spark_llm.engine.model.decoder import Decoder, KVPool
from spark_llm.engine.model.loader import iter_weights, load_config
from spark_llm.engine.model.source import ModelSource, packaged_path, resolve
from spark_llm.engine.request import Completion, Request, SamplingParams
from spark_llm.engine.runner import Done, Runner, poison
from spark_llm.engine.scheduling.lanes import Ints
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.text.template import ChatTemplate
from spark_llm.engine.text.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parent))
from fake_service import service  # noqa: F401 (a fixture)

CLOSE = 1e-4  # logits of the reference: where its two best are nearer, either is right
EOS_IDS = (7, 11)

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": list(EOS_IDS),
    "pad_token_id": 0,
}
TINY: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama3": lambda: transformers.LlamaConfig(
        **SIZES,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES | {"num_key_value_heads": 1}, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
}


@dataclass
class Reference:
    """Greedy answers of transformers. gaps[row][i]: by how much token i won over the second best."""

    outputs: list[list[int]]
    gaps: list[list[float]]

    def check(self, answers: Sequence[Completion]) -> list[int]:
        """AssertionError unless the answers are the same; returns the rows that differ after a tie."""
        assert len(answers) == len(self.outputs)
        tied, wrong = [], []
        for at, (answer, expected, gaps) in enumerate(zip(answers, self.outputs, self.gaps, strict=True)):
            assert answer.error is None, answer
            assert answer.prompt_tokens == answer.cached_tokens + answer.computed_tokens
            if answer.output == expected:
                continue
            pairs = itertools.zip_longest(answer.output, expected)
            first = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
            (tied if first < len(gaps) and gaps[first] <= CLOSE else wrong).append(at)
        assert not wrong, f"{len(wrong)} rows differ from transformers, among them {wrong[:5]}"
        assert len(tied) <= max(1, len(self.outputs) // 100), f"too many ties: rows {tied}"
        if tied:
            print(f"rows that differ after a tie: {tied}")
        return tied


class FakeDevice(Runner):
    """The CPU's runner in a GPU's manner: two steps in flight, and it knows itself which tokens were sampled last."""

    depth = 2

    def __init__(self, *args: Any, rows: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.last = np.full(rows, -1, np.int32)  # by lane

    def launch(self, plan: StepPlan) -> Done:
        done = super().launch(plan)
        self.last[np.concatenate([plan.sampling, plan.decode])] = done._tokens
        return done

    def input_tokens(self, plan: StepPlan) -> Ints:
        tokens: Ints = self.last[plan.decode]
        return tokens


class ModelPair:
    """One model twice: our decoder and transformers' module, with the same weights."""

    def __init__(
        self, config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]], module: transformers.PreTrainedModel
    ) -> None:
        self.config = config
        self.weights = dict(weights)
        self.module = module.eval()
        self.decoder = self.decoder_of(self.weights)

    def decoder_of(self, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Decoder:
        copies = ((name, tensor.clone()) for name, tensor in weights.items())
        return Decoder(self.config, copies, dtype, min(self.config.context_length, 1024))

    def engine(
        self,
        *,
        page_size: int = 1,
        pages: int = 0,
        batch: int = 256,
        running: int = 256,
        cascade: bool = True,
        context: int = 0,
        decoder: Decoder | None = None,
        depth: int = 1,
    ) -> Engine:
        """An engine that checks its invariants after each step. pages 0: as many as 8192 tokens need."""
        pages = pages or 8192 // page_size
        decoder = decoder or self.decoder
        pool = KVPool(self.config, pages * page_size, decoder.dtype)
        spec = EngineSpec(
            page_size=page_size,
            max_batch_tokens=batch,
            max_running_rows=running,
            context_length=context,
            check_invariants=True,
        )
        runner = Runner(decoder, pool, page_size, cascade=cascade)
        if depth == 2:
            runner = FakeDevice(decoder, pool, page_size, cascade=cascade, rows=running)
        return Engine(spec, runner, CacheManager(pages, page_size), cast(Any, None), "float32")

    def answer(self, requests: Sequence[Request], **settings: Any) -> list[Completion]:
        """The requests' answers in their order; settings are those of ``run``."""
        done = self.run(requests, **settings)
        return [done[request.id] for request in requests]

    def run(
        self,
        requests: Sequence[Request],
        *,
        engine: Engine | None = None,
        preempt_every: int = 0,
        clear_every: int = 0,
        late: int = 0,
        before_step: Callable[[Engine, int], object] = lambda engine, step: None,
        **settings: Any,
    ) -> dict[int, Completion]:
        """Request id -> answer. Free pages are NaN in every step, and in the end nothing may be held.

        preempt_every, clear_every: every so many steps a running row loses its pages, or the cache all that
        nobody holds. late: so many requests come while the others run. before_step: told the step's number.
        """
        engine = engine or self.engine(**settings)
        scheduler = engine.scheduler
        pages = np.arange(scheduler.cache.pool.total, dtype=np.int32)
        draw = random.Random(0)
        todo = list(requests[len(requests) - late :])
        for request in requests[: len(requests) - late]:
            engine.add(request)
        done: dict[int, Completion] = {}
        step = 0
        while engine.has_work() or todo:
            if todo:
                engine.add(todo.pop(0))
            if preempt_every and step % preempt_every == 1 and scheduler.running:
                scheduler.preempt(draw.choice(scheduler.running))
            if clear_every and step % clear_every == 0:
                scheduler.cache.clear()
            before_step(engine, step)
            poison(engine.runner.pool, pages[scheduler.cache.pool.is_free(pages)], engine.runner.page_size)
            for completion in engine.step():
                assert completion.id not in done, "a row is answered twice"
                done[completion.id] = completion
            step += 1
            assert step < 100_000, "the engine makes no progress"
        assert scheduler.cache.tree.protected == 0
        scheduler.cache.clear()
        assert scheduler.cache.pool.free == scheduler.cache.pool.total, "pages leaked"
        return done

    @staticmethod
    def requests(prompts: Sequence[Sequence[int]], max_tokens: int, **options: Any) -> list[Request]:
        """One greedy request for each prompt; options are those of Request."""
        params = SamplingParams(max_tokens=max_tokens)
        return [Request(i, np.array(p, np.int32), params, **options) for i, p in enumerate(prompts)]

    def reference(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Reference:
        """transformers.generate, greedy, over groups of prompts of equal length: nothing is padded."""
        outputs: dict[int, list[int]] = {}
        gaps: dict[int, list[float]] = {}
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(i)
        for rows in groups.values():
            ids = torch.tensor([list(prompts[i]) for i in rows])
            result = self.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=list(self.config.eos_ids),
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            best = torch.stack(result.logits, 1).float().topk(2).values  # [rows, tokens, 2]
            for at, i in enumerate(rows):
                tokens = result.sequences[at, ids.shape[1] :].tolist()
                ends = [j for j, token in enumerate(tokens) if token in self.config.eos_ids]
                outputs[i] = tokens[: ends[0] + 1] if ends else tokens
                gaps[i] = (best[at, :, 0] - best[at, :, 1]).tolist()[: len(outputs[i])]
        return Reference([outputs[i] for i in range(len(prompts))], [gaps[i] for i in range(len(prompts))])


def tree_of_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts as tables make them: groups that share a long prefix, groups within groups, some equal rows."""
    draw = random.Random(seed)
    words = lambda n: [draw.randrange(16, 512) for _ in range(n)]  # noqa: E731
    template = words(12)
    prompts: list[list[int]] = [words(1), words(1), words(2), words(3), words(180)]
    while len(prompts) < count:
        prefix = template + words(draw.choice([4, 20, 36, 52]))
        for _ in range(draw.choice([1, 4, 8])):
            if draw.random() < 0.3:
                inner = prefix + words(16)
                prompts += [inner + words(4) for _ in range(2)]
            else:
                prompts.append(prefix + words(draw.choice([2, 4, 8])))
        if draw.random() < 0.2:
            prompts.append(list(prompts[-1]))
    prompts = prompts[:count]
    draw.shuffle(prompts)
    return prompts


@dataclass
class Case:
    """Prompts and what transformers answers to them with at most ``max_tokens`` tokens."""

    model: ModelPair
    prompts: list[list[int]]
    max_tokens: int
    expected: Reference

    def check(self, *, rows: int | None = None, reuse: bool = True, **settings: Any) -> list[Completion]:
        """Answer (the first ``rows`` of) the prompts under the settings of ModelPair.run, and compare."""
        answers = self.model.answer(self.requests(rows, reuse=reuse), **settings)
        self.compare(answers)
        return answers

    def requests(self, rows: int | None = None, **options: Any) -> list[Request]:
        """The first ``rows`` prompts; the id of a request is the place of its prompt."""
        return self.model.requests(self.prompts[:rows], self.max_tokens, **options)

    def compare(self, answers: Iterable[Completion]) -> None:
        """AssertionError unless each answer is what transformers answers to the prompt of its id."""
        answers = list(answers)
        expected = self.expected
        Reference(
            [expected.outputs[answer.id] for answer in answers], [expected.gaps[answer.id] for answer in answers]
        ).check(answers)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products gain little from a second thread, and on a busy machine two wait for each other all the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelPair]:
    """A random two-layer model by architecture, made once. Its weights are wide, so that attention is sharp."""
    made: dict[str, ModelPair] = {}

    def make(name: str) -> ModelPair:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            torch.manual_seed(len(name))
            module = transformers.AutoModelForCausalLM.from_config(TINY[name]())
            for parameter in module.parameters():  # biases and norms of a new model would all be 0 or 1
                wide = parameter.dim() > 1
                torch.nn.init.normal_(parameter, mean=0.0 if wide else 0.7, std=0.2)
            module.save_pretrained(folder)
            source = resolve(str(folder))
            config = load_config(source)
            assert set(config.eos_ids) == set(EOS_IDS)
            made[name] = ModelPair(config, iter_weights(source, torch.float32, config), module)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny_case(tiny_models: Callable[[str], ModelPair]) -> Callable[[str], Case]:
    """320 prompts and their answers by architecture."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            model, prompts = tiny_models(name), tree_of_prompts(320)
            made[name] = Case(model, prompts, 6, model.reference(prompts, 6))
        return made[name]

    return make


@pytest.fixture(scope="session")
def demo_model() -> ModelPair:
    """The packaged SmolLM2 (Llama) in float32. That its weights are those of the file, tests of the loader show."""
    source = ModelSource("gguf", cast(Path, packaged_path()), "demo")
    config = load_config(source)
    weights = dict(iter_weights(source, torch.float32, config))
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.context_length,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tie_word_embeddings,
            )
        )
    module.load_state_dict(weights, strict=False, assign=True)
    module.tie_weights()
    rotary = module.model.rotary_emb
    module.model.rotary_emb = type(rotary)(config=module.config)  # its buffers are not in the file
    assert not any(p.is_meta for p in [*module.parameters(), *module.buffers()])
    return ModelPair(config, weights, module)


@pytest.fixture(scope="session")
def chat_prompt() -> Callable[[str], list[int]]:
    """The ids of a user message in the packaged model's chat template."""
    source = resolve("default")
    loaded = load_tokenizer(source)
    frame = ChatTemplate(cast(str, loaded.chat_template), loaded.special_tokens, loaded.name).frame(None)

    def ids(message: str) -> list[int]:
        encoded: list[int] = loaded.tokenizer.encode(frame.render(message), add_special_tokens=False).ids
        return encoded

    return ids
