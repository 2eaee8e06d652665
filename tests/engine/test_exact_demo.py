"""The packaged model answers real reviews as transformers.generate does, token by token, in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spark_llm.datasets.catalogue import CATALOGUE
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.loading import load_engine

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]  # a busy machine takes minutes

TASKS = (
    "Is the sentence positive, negative or neutral? Answer with one word.",
    "Which part of the product does the sentence speak of?",
    "Does the writer recommend the product? Answer yes or no.",
)
MAX_TOKENS = 5


@pytest.fixture(scope="module")
def reviews(chat_prompt: Callable[[str], list[int]]) -> list[list[int]]:
    """104 prompts: three questions on 34 sentences each, and two whole reviews, in no order.

    Of each question the prompts are equally long, so that transformers answers them in one batch without padding.
    """
    tables = CATALOGUE["products"].load()
    sentences = tables["review_sentences"]["sentence"].drop_duplicates()
    prompts: list[list[int]] = []
    for number, task in enumerate(TASKS):
        found = [chat_prompt(f"{task}\n{s}") for s in sentences[sentences.str.len().between(20, 60)].iloc[number::3]]
        lengths = Counter(map(len, found)).most_common(1)
        prompts += [ids for ids in found if len(ids) == lengths[0][0]][:34]
    bodies = tables["product_reviews"]["body"]
    prompts += [chat_prompt(f"{TASKS[0]}\n{body}") for body in bodies[bodies.str.len().between(500, 900)].head(2)]
    order = sorted(range(len(prompts)), key=lambda i: (i * 37) % 101)
    return [prompts[i] for i in order]


@pytest.fixture(scope="module")
def expected(demo_model: Any, reviews: list[list[int]]) -> Any:
    return demo_model.reference(reviews, MAX_TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"page_size": 16, "batch": 65, "pages": 40, "preempt_every": 7, "cascade": False},
        {"reuse": False, "page_size": 4, "batch": 700, "running": 20},
    ],
    ids=["as it comes", "little room, chunks, preempted, no cascade", "no reuse"],
)
def test_real_reviews_are_answered_as_transformers_answers_them(
    demo_model: Any, reviews: list[list[int]], expected: Any, settings: dict[str, Any]
) -> None:
    assert len(reviews) >= 100
    settings = dict(settings)
    requests = demo_model.requests(reviews, MAX_TOKENS, reuse=settings.pop("reuse", True))
    answers = demo_model.answer(requests, **settings)
    tied = expected.check(answers)
    assert len(tied) <= len(reviews) // 100
    cached = sum(a.cached_tokens for a in answers) / sum(a.prompt_tokens for a in answers)
    assert cached > 0.5 if requests[0].reuse else cached == 0


def test_one_wrong_weight_is_noticed(demo_model: Any, reviews: list[list[int]], expected: Any) -> None:
    """The comparison can fail: one of 134 million numbers is wrong."""
    weights = dict(demo_model.weights)
    name = "model.layers.15.input_layernorm.weight"
    weights[name] = weights[name].clone()
    weights[name][0] += 20
    engine = demo_model.engine(decoder=demo_model.decoder_of(weights))
    some = replace(expected, outputs=expected.outputs[:16], gaps=expected.gaps[:16])
    answers = demo_model.answer(demo_model.requests(reviews[:16], MAX_TOKENS), engine=engine)
    with pytest.raises(AssertionError, match="differ from transformers"):
        some.check(answers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_answer_nearly_the_same(
    demo_model: Any, reviews: list[list[int]], expected: Any, dtype: str
) -> None:
    """As a user asks for them: rounded to the format, computed in whatever this CPU is good at."""
    engine = load_engine(EngineSpec(dtype=dtype, kv_cache_memory=256 << 20, check_invariants=True))  # type: ignore[arg-type]
    assert engine.dtype == dtype
    answers = demo_model.answer(demo_model.requests(reviews[:32], 1), engine=engine)
    same = [a.output[0] == e[0] for a, e in zip(answers, expected.outputs, strict=False)]
    assert sum(same) >= 28
