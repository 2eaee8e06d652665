"""Rows at and beyond the limits: each is answered exactly or with an error of its own; its neighbours never notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spark_llm.engine.request import Completion, FinishReason
from spark_llm.errors import LlmError

TinyCase = Callable[[str], Any]


def refusal(answer: Completion) -> LlmError:
    """The error of a row that was never run."""
    assert answer.finish_reason is FinishReason.ERROR
    assert answer.error is not None
    assert answer.output == []
    error = LlmError(answer.error[0], **answer.error[1])
    assert "<" not in str(error), "a parameter of the message is missing"
    return error


def test_a_row_that_is_too_long_fails_alone_and_names_its_numbers(tiny_case: TinyCase) -> None:
    case = tiny_case("llama")
    requests = case.requests(20)
    too_long = case.model.requests([[5] * 507], 6)[0]
    requests[4] = replace(too_long, id=4)
    answers = case.model.run(requests)
    error = refusal(answers.pop(4))
    assert error.condition == "LLM_CONTEXT_LENGTH_EXCEEDED"
    assert error.parameters["excess"] == "The prompt has 507 tokens and max_tokens is 6"
    assert error.parameters["limit"] == "512"
    case.compare(answers.values())


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_row_may_fill_the_context_to_the_last_token(tiny_case: TinyCase, page_size: int) -> None:
    model = tiny_case("llama3").model
    prompts = [[1 + i % 400 for i in range(506)], [3] * 506, [3] * 505]
    answers = model.answer(model.requests(prompts, 6), page_size=page_size, batch=100)
    model.reference(prompts, 6).check(answers)


@pytest.mark.parametrize(("page_size", "batch"), [(1, 7), (4, 5), (16, 256)])
def test_a_row_may_be_as_long_as_the_pool_but_not_longer(tiny_case: TinyCase, page_size: int, batch: int) -> None:
    case = tiny_case("llama")
    limit = 64 // page_size * page_size
    prompts = [[17 + i for i in range(limit - 6)], [40] * (limit - 5), [17 + i for i in range(limit - 7)], [300]]
    answers = case.model.run(
        case.model.requests(prompts, 6), page_size=page_size, pages=limit // page_size, batch=batch
    )
    error = refusal(answers.pop(1))
    assert error.condition == "LLM_CONTEXT_LENGTH_EXCEEDED"
    assert error.parameters["limit"] == str(limit)
    case.model.reference([prompts[i] for i in sorted(answers)], 6).check([answers[i] for i in sorted(answers)])


def test_the_context_length_of_the_settings_counts(tiny_case: TinyCase) -> None:
    model = tiny_case("llama").model
    answers = model.run(model.requests([[5] * 28, [5] * 29], 4), context=32)
    assert answers[0].error is None
    assert refusal(answers[1]).parameters["limit"] == "32"


@pytest.mark.parametrize(("prompt", "max_tokens", "word"), [([], 4, "no tokens"), ([5, 6], 0, "max_tokens")])
def test_an_impossible_request_fails_alone(tiny_case: TinyCase, prompt: list[int], max_tokens: int, word: str) -> None:
    case = tiny_case("llama")
    requests = case.requests(5)
    requests[2] = replace(case.model.requests([prompt], max_tokens)[0], id=2)
    answers = case.model.run(requests)
    error = refusal(answers.pop(2))
    assert error.condition == "LLM_INVALID_REQUEST"
    assert word in str(error)
    case.compare(answers.values())


def test_a_refused_row_that_is_cancelled_gets_no_answer(tiny_case: TinyCase) -> None:
    case = tiny_case("llama")
    engine = case.model.engine()
    engine.add(case.model.requests([[]], 4)[0])
    assert engine.has_work()
    engine.cancel([0])
    assert not engine.has_work()
    assert engine.step() == []


def test_a_sliding_window_bounds_the_context(tiny_case: TinyCase) -> None:
    """Within its window such a model is an ordinary one; beyond it the engine would answer something else."""
    case = tiny_case("mistral")
    model = case.model
    config = model.decoder.config
    try:
        model.decoder.config = replace(config, sliding_window=40)
        answers = model.run(model.requests([[5] * 36, [5] * 37], 4))
    finally:
        model.decoder.config = config
    assert answers[0].error is None
    assert refusal(answers[1]).parameters["limit"] == "40"


def test_only_whole_pages_are_shared(tiny_case: TinyCase) -> None:
    """Equal prompts around a page border: what is cached is whole pages, and at least one token is computed."""
    model = tiny_case("llama").model
    for length in (15, 16, 17, 32, 33):
        prompt = [30 + i for i in range(length)]
        answers = model.answer(model.requests([prompt, prompt], 3), page_size=16, batch=20)
        model.reference([prompt, prompt], 3).check(answers)
        assert {a.cached_tokens for a in answers} == {0, (length - 1) // 16 * 16}
