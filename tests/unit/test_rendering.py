"""The rendered text of rows: exact, a function of the row alone, cut where tokenizers may be cut."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.call import FieldSpec
from spark_llm.engine.service.protocol import REQUEST_SCHEMA
from spark_llm.rendering import RenderedWindow, asks, render, request_batch

SPECS = (FieldSpec("title"), FieldSpec("year", json=True))


def strings(*values: str | None) -> pa.Array:
    return pa.array(values, pa.utf8())


def one(prompt: str | None, *fields: tuple[str, str | None, bool]) -> list[str]:
    window = render(
        strings(prompt),
        [strings(value) for _, value, _ in fields],
        [FieldSpec(name, json=is_json) for name, _, is_json in fields],
    )
    return window.texts(0)


def test_prompt_and_fields_are_one_line_each() -> None:
    assert one("Is it good?", ("title", 'The "Thing"', False), ("year", "1982", True)) == [
        "Is it good?\n",
        'title: The "Thing"\n',
        "year: 1982\n",
    ]


@pytest.mark.parametrize("text", ["a: b", "13/20", "true story", "1 2", "-", "C:\\temp", "👍", "e5", "nullable"])
def test_text_stands_as_it_is(text: str) -> None:
    assert one("p", ("x", text, False))[1] == f"x: {text}\n"


@pytest.mark.parametrize(
    "text", ["", " a", "a ", "\u00a0", "a\u2028b", "true", "null", "12", "-1.5e3", '"a"', "[1]", "{}", "a\x00"]
)
def test_text_that_could_be_something_else_is_a_json_string(text: str) -> None:
    assert one("p", ("x", text, False))[1] == f"x: {json.dumps(text, ensure_ascii=False)}\n"


@given(st.lists(st.tuples(st.sampled_from(["text", "json", "null"]), st.text(max_size=4)), max_size=30))
@settings(deadline=None)
def test_different_values_give_different_lines(values: list[tuple[str, str]]) -> None:
    cells: set[tuple[bool, str | None]] = {
        (kind == "json", None if kind == "null" else json.dumps([text]) if kind == "json" else text)
        for kind, text in values
    }
    cells = {(is_json and value is not None, value) for is_json, value in cells}
    lines = [one("p", ("x", value, is_json))[1] for is_json, value in cells]
    assert len(set(lines)) == len(lines)
    assert all(line.count("\n") == 1 for line in lines)


def test_newlines_in_values_are_escaped_and_other_characters_kept() -> None:
    assert one("p", ("x", "a\nb\r\n\tü €", False))[1] == 'x: "a\\nb\\r\\n\\tü €"\n'


def test_null_field_is_json_null() -> None:
    assert one("p", ("a", None, False), ("b", "1", True)) == ["p\n", "a: null\n", "b: 1\n"]


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a_1", "a_1: "),
        ("größe", "größe: "),
        ("movie title", "movie title: "),
        ("beer/name", "beer/name: "),
        ("a:b", "a:b: "),
        ("", '"": '),
        ("a: b", '"a: b": '),
        ("a:", '"a:": '),
        (" a", '" a": '),
        ('"a"', '"\\"a\\"": '),
        ("a:\n", '"a:\\n": '),
    ],
)
def test_a_name_that_could_be_misread_is_quoted(name: str, start: str) -> None:
    assert one("p", (name, "v", False))[1] == f"{start}v\n"


@pytest.mark.parametrize("prompt", ["p", "p\n", "p \n\n", "p  "])
def test_the_prompt_ends_in_one_newline_before_fields(prompt: str) -> None:
    assert one(prompt, ("a", "v", False))[0] == "p\n"


def test_without_fields_the_prompt_stands_alone_unchanged() -> None:
    assert one("two lines\n \n") == ["two lines\n \n"]


def test_a_blank_prompt_leaves_only_the_fields() -> None:
    assert one("  \n", ("a", "v", False)) == ["", "a: v\n"]


def test_rows_without_a_call() -> None:
    fields = [strings("a", "a", None, None, "a"), strings("1", "1", "2", None, None)]
    assert asks(strings("p", None, "p", "p", ""), fields).tolist() == [True, False, True, False, True]


def test_a_prompt_without_fields_needs_only_itself() -> None:
    assert asks(strings("p", None), []).tolist() == [True, False]


def test_fields_are_rendered_in_the_order_of_each_row() -> None:
    fields = [strings("a", "b"), strings("1", "2")]
    window = render(strings("p", "p"), fields, SPECS, np.array([[1, 0], [0, 1]]))
    assert window.texts(0) == ["p\n", *reversed(one("p", ("title", "a", False), ("year", "1", True))[1:])]
    assert window.texts(1) == one("p", ("title", "b", False), ("year", "2", True))


def test_the_instruction_may_stand_last() -> None:
    window = render(strings(" p \n"), [strings("a"), strings("1")], SPECS, np.array([[1, 0]]), instruction_last=True)
    assert window.texts(0) == ["year: 1\n", "title: a\n", "p\n"]


def test_null_and_json_null_are_the_same_segment() -> None:
    window = render(strings("p", "p"), [strings("x", "x"), strings(None, "null")], SPECS)
    assert window.codes[0].tolist() == window.codes[1].tolist()


def read(text: str) -> object:
    """What a cell of a text field says."""
    return json.loads(text) if text == "null" or text.startswith('"') else text


values = st.one_of(st.none(), st.text(max_size=8))


@given(st.lists(st.tuples(values, values, values), max_size=20))
@settings(deadline=None)
def test_each_row_renders_as_it_would_alone(rows: list[tuple[str | None, str | None, str | None]]) -> None:
    columns = [strings(*(row[i] for row in rows)) for i in range(3)]
    specs = [FieldSpec("a"), FieldSpec("the b")]
    window = render(columns[0], columns[1:], specs)
    for number, (prompt, a, b) in enumerate(rows):
        is_asked = prompt is not None and not (a is None and b is None)
        assert bool(asks(columns[0], columns[1:])[number]) == is_asked
        if is_asked:
            assert window.texts(number) == one(prompt, ("a", a, False), ("the b", b, False))
            assert read(window.texts(number)[1].removeprefix("a: ").removesuffix("\n")) == a


@given(st.lists(st.tuples(values, values), min_size=1, max_size=20))
@settings(deadline=None)
def test_segments_can_be_cut(rows: list[tuple[str | None, str | None]]) -> None:
    window = render(strings(*("p" for _ in rows)), [strings(*c) for c in zip(*rows, strict=True)], SPECS[:1] * 2)
    for row in range(len(rows)):
        for left, right in zip(window.texts(row), window.texts(row)[1:], strict=False):
            assert left.endswith("\n")
            assert not left[-2].isspace()
            assert not right[0].isspace()


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), min_size=1, max_size=20))
@settings(deadline=None)
def test_codes_compare_as_texts(rows: list[tuple[str, str]]) -> None:
    window = render(strings(*(r[0] for r in rows)), [strings(*(r[1] for r in rows))], SPECS[:1])
    texts = window.dictionary.to_pylist()
    assert texts == sorted(set(texts))


def requests_of(window: RenderedWindow, rows: list[int], **more: list[Any]) -> pa.RecordBatch:
    return request_batch(window, np.array(rows, np.int64), 100, **more)


def test_request_batch_holds_only_the_segments_of_its_rows() -> None:
    window = render(strings("p", "p", "q"), [strings("a", "b", "c")], SPECS[:1])
    batch = requests_of(window, [1, 0])
    assert batch.schema == REQUEST_SCHEMA
    batch.validate(full=True)
    assert batch["id"].to_pylist() == [100, 101]
    assert batch["segments"].to_pylist() == [["p\n", "title: b\n"], ["p\n", "title: a\n"]]
    assert sorted(batch["segments"].values.dictionary.to_pylist()) == [
        "p\n",
        "title: a\n",
        "title: b\n",
    ]
    assert batch["seed"].null_count == 2


def test_requests_carry_their_keys_and_seeds() -> None:
    window = render(strings("p", "p"), [strings("a", "b")], SPECS[:1])
    batch = requests_of(window, [1, 0], keys=[b"k", b"l"], seeds=[5, 6])
    assert batch["key"].to_pylist() == [b"k", b"l"]
    assert batch["seed"].to_pylist() == [5, 6]
    assert requests_of(window, [1, 0])["key"].null_count == 2


def test_an_empty_window() -> None:
    window = render(strings(), [strings()], SPECS[:1])
    assert window.codes.shape == (0, 2)
    assert requests_of(window, []).num_rows == 0
