"""Prompts with several rows: which rows come together, what the model reads, and what its answer is taken for."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_llm.call import FieldSpec, PromptPlan
from spark_llm.shared_prompt import Together, answers, prompts, segments, shared_batch, shared_key

TOGETHER = Together(rows=3, left=(0,), right=(1,))
FIELDS = (FieldSpec("left"), FieldSpec("right"))


def columns(rows: list[tuple[str | None, ...]]) -> list[pa.Array]:
    return [pa.array(column, pa.utf8()) for column in zip(*rows, strict=True)]


def test_the_left_row_stands_once_and_the_rows_have_numbers() -> None:
    rows = columns([("Same?", "a", "b"), ("Same?", "a", None), ("Same?", "a", "12")])
    expected = ["Same?\n", "left: a\n", "1. right: b\n", "2. right: null\n", '3. right: "12"\n']
    found = segments(rows, [0, 1, 2], FIELDS, TOGETHER)
    assert found[:-1] == expected
    assert found[-1].startswith("Answer for each of the 3 rows")
    last = segments(rows, [0, 1, 2], FIELDS, TOGETHER, instruction_last=True)
    assert last == [*expected[1:], expected[0], found[-1]]


values = st.one_of(st.none(), st.sampled_from("abcde"))


@given(
    st.lists(st.tuples(st.sampled_from("pq"), values, values), min_size=1, max_size=30), st.integers(2, 5), st.data()
)
def test_rows_of_one_left_side_come_together_in_an_order_of_their_own(
    rows: list[tuple[str | None, ...]], most: int, data: st.DataObject
) -> None:
    together = Together(rows=most, left=(0,), right=(1,))

    def asked(rows: list[tuple[str | None, ...]]) -> list[list[tuple[str | None, ...]]]:
        return [[rows[row] for row in prompt] for prompt in prompts(columns(rows), together)]

    found = asked(rows)
    assert sorted((row for prompt in found for row in prompt), key=str) == sorted(rows, key=str)
    assert all(len({row[:2] for row in prompt}) == 1 and len(prompt) <= most for prompt in found)
    sizes = {row[:2]: sum(other[:2] == row[:2] for other in rows) for row in rows}
    assert len(found) == sum(-(-size // most) for size in sizes.values())
    shuffled = data.draw(st.permutations(rows))
    assert sorted(asked(shuffled), key=str) == sorted(found, key=str)


def test_a_prompt_is_known_by_its_rows_in_their_order() -> None:
    keys = [b"1" * 16, b"2" * 16]
    assert shared_key(keys) != shared_key(keys[::-1])
    assert shared_key(keys[:1]) != keys[0]


def test_messages_of_different_lengths_travel_together() -> None:
    messages = [["a\n", "b\n"], ["a\n", "c\n", "d"]]
    batch = shared_batch(messages, 7, keys=[b"x", b"y"])
    assert batch["segments"].to_pylist() == messages
    assert batch["id"].to_pylist() == [7, 8]
    assert batch["key"].to_pylist() == [b"x", b"y"]


# Answers

# What a model may be asked to say in one line; not what looks like a number of another line's.
line = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8).filter(
    lambda text: text == text.strip() and len(text.splitlines()) == 1 and text[0] not in ":=*"
)


@given(st.lists(line, min_size=1, max_size=64))
def test_answers_come_back_as_they_were_written(texts: list[str]) -> None:
    written = "\n".join(f"{number}: {text}" for number, text in enumerate(texts, 1))
    assert answers(written, len(texts), False) == texts
    assert answers(written, len(texts), True) == [*texts[:-1], None]


@given(st.text(), st.integers(1, 64), st.booleans())
def test_any_text_gives_an_answer_or_none_for_each_row(text: str, rows: int, is_cut: bool) -> None:
    found = answers(text, rows, is_cut)
    assert len(found) == rows
    assert all(answer is None or (answer and answer in text) for answer in found)


@pytest.mark.parametrize(
    "text",
    [
        "1: yes\n2: no",
        "1. yes\n2. no",
        "1) yes\n2) no",
        "(1) yes\n(2) no",
        "[1]: yes\n[2]: no",
        "Row 1: yes\nRow 2: no",
        "- 1: yes\n- 2: no",
        "**1:** yes\n**2:** no",
        "**Row 1**: yes\n**Row 2**: no",
        "1 - yes\n2 - no",
        "Here are the answers:\n\n1: yes\n\n2: no\n",
        "```\n1: yes\n2: no\n```",
        "2: no\n1: yes",
        "  1:yes  \n  2:no  ",
        "1: yes\n2: no\n3: yes\n4: no",
    ],
)
def test_lines_are_known_in_many_forms(text: str) -> None:
    assert answers(text, 2, False) == ["yes", "no"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [None, None, None]),
        ("yes", [None, None, None]),
        ("1: yes, 2: no, 3: yes", [None, None, None]),
        ("1) yes; 2) no\n3) yes", [None, None, "yes"]),
        ("1: yes\n2: no\n3: at 2: pm", ["yes", "no", "at 2: pm"]),
        ("yes\nno\nno", [None, None, None]),
        ("1: yes\n3: no", ["yes", None, "no"]),
        ("1: yes\n2: no\n2: yes\n3: no", ["yes", None, "no"]),
        ("1: yes\n1: yes\n2: no\n3: no", [None, "no", "no"]),
        ("0: yes\n1: no\n2: no", [None, None, None]),
        ("1: yes\n2:\n3: no", ["yes", None, "no"]),
        ("1: yes\nbecause it is\n2: no\n3: no", [None, "no", "no"]),
        ("1: 2.5\n2: 1.5 kg\n3: 3: 4", ["2.5", "1.5 kg", "3: 4"]),
        ("1: yes\n2.5 is not a line\n3: no", [None, None, "no"]),
    ],
)
def test_what_is_not_sure_is_no_answer(text: str, expected: list[str | None]) -> None:
    assert answers(text, 3, False) == expected


def test_a_stop_string_ends_each_answer() -> None:
    assert answers("1: yes; but\n2: no", 2, False, stop=(";", "x")) == ["yes", "no"]


def test_the_answer_has_room_for_each_row_and_its_number() -> None:
    assert PromptPlan().most_output(5) == 5
    assert PromptPlan(rows=4, left=(0,)).most_output(5) >= 4 * (5 + 4)
