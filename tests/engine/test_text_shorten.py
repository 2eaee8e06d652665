"""``truncate => 'longest'``: what is cut of messages that are longer than the context, and what is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from spark_llm.engine.model.source import resolve
from spark_llm.engine.request import SamplingParams
from spark_llm.engine.service.protocol import StreamOpen, request_rows
from spark_llm.engine.text.pipeline import TextPipeline
from spark_llm.engine.text.shorten import MARK, shortened


def characters(text: str) -> list[tuple[int, int]]:
    """A tokenizer of single characters."""
    return [(place, place + 1) for place in range(len(text))]


def test_the_longest_field_loses_its_end() -> None:
    found = shortened(["ask\n", "a: short\n", "b: " + "x" * 50 + "\n"], range(1, 3), 20, characters)
    assert found is not None
    assert found[:2] == ["ask\n", "a: short\n"]
    assert found[2].startswith("b: xxx")
    assert found[2].endswith(f"x{MARK}\n")
    assert 54 - len(found[2]) >= 20


def test_the_next_longest_follows_and_the_instruction_stays() -> None:
    rows = ["i" * 90 + "\n", "a: " + "y" * 30 + "\n", "b: " + "x" * 50 + "\n"]
    found = shortened(rows, range(1, 3), 65, characters)
    assert found is not None
    assert found[0] == rows[0]
    assert found[2] == f"{MARK}\n"
    assert found[1].startswith("a: y")
    assert shortened(rows, range(1, 3), 200, characters) is None


@pytest.fixture(scope="module")
def pipeline() -> TextPipeline:
    found = TextPipeline.load(resolve("default"))
    found.keep_within(160)
    return found


def encoded(pipeline: TextPipeline, rows: Sequence[Sequence[str]], header: StreamOpen) -> list[list[int]]:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    segments = pa.array([segment for row in rows for segment in row], pa.utf8()).dictionary_encode()
    batch = request_rows(range(len(rows)), pa.ListArray.from_arrays(pa.array(offsets), segments))
    return [prompt.tolist() for prompt in pipeline.encode_rows(header, batch)[0]]


@pytest.mark.model
@pytest.mark.parametrize("instruction_segments", [0, 1])
def test_prompts_come_to_fit_and_others_stay(pipeline: TextPipeline, instruction_segments: int) -> None:
    """Prompt and answer are within the context, and filled: not much more is cut than is too much."""
    texts = ["word " * 300, "naïve — ünïcödé 😀 " * 40, "short", "a" * 2000]
    rows = [["Is it good?\n", f"title: film {n}\n", f"text: {text.strip()}\n"] for n, text in enumerate(texts)]
    if not instruction_segments:
        rows = [[*row[1:], row[0]] for row in rows]
    params = SamplingParams(max_tokens=20)
    header = StreamOpen(params=params, instruction_segments=instruction_segments)
    whole = encoded(pipeline, rows, header)
    assert [len(prompt) > 140 for prompt in whole] == [True, True, False, True]
    cut = encoded(pipeline, rows, StreamOpen(params=params, instruction_segments=instruction_segments, truncate=True))
    assert cut[2] == whole[2]
    assert all(120 < len(cut[number]) <= 140 for number in (0, 1, 3))
    for number in (0, 1, 3):
        text = pipeline.decode([cut[number]])[0]
        assert "Is it good?" in text
        assert f"title: film {number}" in text
        assert MARK in text


@pytest.mark.model
def test_a_long_instruction_is_not_cut(pipeline: TextPipeline) -> None:
    header = StreamOpen(params=SamplingParams(max_tokens=20), truncate=True)
    rows = [["Is it good? " * 80 + "\n", "a: b\n"], ["word " * 300]]
    assert encoded(pipeline, rows, header) == encoded(pipeline, rows, StreamOpen(params=header.params))
