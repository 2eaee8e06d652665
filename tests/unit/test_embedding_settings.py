"""What a call that makes vectors comes to for a task, its engine, its report and the cost model."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import pytest

from spark_llm.answer_form import why_not
from spark_llm.asking import Asker
from spark_llm.call import AnswerForm, CallSpec
from spark_llm.call_settings import answer_settings, stream_header
from spark_llm.config import LlmConf
from spark_llm.engine.request import Client
from spark_llm.optimizer.cost import NONE, CallInput, Speed, call_cost, exact
from spark_llm.tally import Counts, Tally, TaskUpdate
from spark_llm.window_size import FIRST_ROWS

VECTOR = AnswerForm(kind="embedding", is_json=True)
EMBED = CallSpec(answer=VECTOR)
OPENAI = {"spark.llm.backend": "openai", "spark.llm.backend.url": "https://host/v1"}


def test_the_task_is_that_of_the_answers() -> None:
    assert EMBED.task == "embed"
    assert CallSpec().task == CallSpec(answer=AnswerForm(kind="regex", text="a")).task == "generate"
    assert EMBED.canonical() != CallSpec().canonical()


def test_the_engine_has_the_encoder_and_what_concerns_one() -> None:
    settings = {"spark.llm.model": "chat", "spark.llm.embedding.model": "encoder", "spark.llm.engine.dtype": "float32"}
    spec = LlmConf.parse(settings | {"spark.llm.engine.threads": "3"}).engine_spec(None, "embed")
    assert (spec.model, spec.task, spec.dtype, spec.threads) == ("encoder", "embed", "float32", 3)
    other = {
        "spark.llm.engine.kvCacheMemory": "1g",
        "spark.llm.scheduler": "fcfs",
    }
    assert (
        LlmConf.parse(settings | other | {"spark.llm.engine.threads": "3"}).engine_spec(None, "embed").key == spec.key
    )
    assert LlmConf.parse(settings).engine_spec("mine", "embed").model == "mine"
    assert LlmConf.parse({"spark.llm.engine.contextLength": "9"}).engine_spec(None, "embed").context_length == 9
    assert LlmConf.parse(settings).engine_spec().model == "chat"
    assert LlmConf().engine_spec(task="embed").key != LlmConf().engine_spec().key


def test_a_server_may_embed() -> None:
    spec = LlmConf.parse(OPENAI | {"spark.llm.embedding.model": "small"}).engine_spec(None, "embed")
    assert (spec.model, spec.task) == ("small", "embed")
    assert spec.backend is not None


def test_no_constraint_is_sent() -> None:
    assert stream_header(EMBED, LlmConf(), Client("", "1")).constraint is None


@pytest.mark.parametrize(("length", "rows"), [(4_700, 2231), (50_000, 209), (10, 4096), (10**8, 16)])
def test_windows_are_as_large_as_their_answers_allow(length: int, rows: int) -> None:
    settings = answer_settings(EMBED, LlmConf(), {})
    vectors = Asker(settings, fail_to_open).window
    assert vectors.rows == FIRST_ROWS
    vectors.told(None)
    assert vectors.rows == FIRST_ROWS
    vectors.told("x" * length)
    vectors.told("x" * length)
    assert vectors.rows == rows
    assert Asker(answer_settings(CallSpec(), LlmConf(), {}), fail_to_open).window.rows == 4096
    assert Asker(replace(settings, window_rows=7), fail_to_open).window.rows == 7


def fail_to_open() -> NoReturn:
    raise AssertionError("nothing is asked")


@pytest.mark.parametrize("wrong", ["", "0.5", '["0.5"]', "[0.5, null]", "[NaN]", "[1e999]", "[0.5", '{"a": [1]}'])
def test_what_is_no_vector(wrong: str) -> None:
    assert why_not(VECTOR, "[0.5, -1e-7, 3]") is None
    reason = why_not(VECTOR, wrong)
    assert reason is not None
    assert "is no array of numbers" in reason


def test_the_measured_speed_leaves_embeddings_out() -> None:
    tally = Tally()
    counts = Counts(rows=9, computed_tokens=5000, first_sent=1.0, last_answer=2.0)
    tally.merge(TaskUpdate(query="1", task="a", prompt="p", embeds=True, number=1, counts=counts))
    assert tally.counts("1", with_embeddings=False) == {}
    assert list(tally.counts("1")) == ["p"]


def test_embeddings_cost_no_answers_and_hit_no_cache() -> None:
    known = CallInput(
        rows=exact(10, "job"), distinct=exact(4, "job"), field_tokens=NONE, shared=NONE, head=0.0, tail=2.0,
        varying_tokens=exact(20, "job"),
    )  # fmt: skip
    cost = call_cost(known, Speed(1000.0, True))
    assert (cost.calls.value, cost.prompt_tokens.value, cost.output_tokens) == (4, 88, NONE)
    assert cost.hit_rate == 0
    assert cost.computed_tokens.value == 88
