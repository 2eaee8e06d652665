"""What a task does with typed answers: a row's own choices, the check of texts, the details beside them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from spark_llm.answer_form import Usage, detailed, details_ddl, row_choices, why_not
from spark_llm.call import AnswerForm, CallSpec
from spark_llm.call_rows import CallRows, Request
from spark_llm.call_settings import constraint
from spark_llm.engine.request import Constraint
from spark_llm.functions import patterns


def test_choices_of_a_row() -> None:
    assert row_choices('["b","a","b",null,""]') == ("b", "a")
    assert row_choices(None) == row_choices("[]") == row_choices("[null]") == ()


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (AnswerForm(kind="choices", choices=("a", "b")), "a", "A"),
        (AnswerForm(kind="choices", field=0), "c", "a"),
        (AnswerForm(kind="json_schema", text="{}", is_json=True), '{"a": 1}', '{"a": 1'),
        (AnswerForm(kind="json_schema", text="{}", is_json=True), "[1e308]", "[-1e999]"),
        (AnswerForm(kind="json_schema", text="{}", is_json=True), '"NaN"', "NaN"),
        (AnswerForm(kind="regex", text=patterns.DATE, portable=True), "2024-02-29", "2024-02-30"),
        (AnswerForm(kind="regex", text=patterns.REAL, portable=True, is_json=True), "1.5", "one"),
    ],
)
def test_texts_of_another_form_are_found(form: AnswerForm, right: str, wrong: str) -> None:
    assert why_not(form, right, ("c",)) is None
    reason = why_not(form, wrong, ("c",))
    assert reason is not None
    assert repr(wrong) in reason


def test_a_users_expression_is_the_engines_to_judge() -> None:
    """Its syntax is not Python's: ``[[:alpha:]]`` would mean something else here."""
    assert why_not(AnswerForm(kind="regex", text="[[:alpha:]]+"), "abc") is None


def test_details_are_json_with_the_answer_as_it_stands() -> None:
    number = AnswerForm(kind="regex", text=patterns.REAL, is_json=True)
    usage = Usage(prompt=9, cached=4, output=2)
    told = detailed(("error", "confidence", "usage"), number, "1.50", None, 0.25, usage)
    assert told.startswith('{"result":1.50,"errorMessage":null,"confidence":0.25,')
    assert json.loads(told)["usage"] == {"prompt_tokens": 9, "cached_tokens": 4, "output_tokens": 2}
    assert json.loads(detailed(("error",), None, 'a "b"\né')) == {"result": 'a "b"\né', "errorMessage": None}
    assert json.loads(detailed(("error",), number, None, "why")) == {"result": None, "errorMessage": "why"}
    assert json.loads(detailed(("usage",), None, "a"))["usage"]["prompt_tokens"] == 0
    assert details_ddl(("error",), "INT") == "STRUCT<result: INT, errorMessage: STRING>"


def test_what_an_answer_cost_is_told_once() -> None:
    """By the first row of the window that asked; by none of a window whose rows were asked about before."""
    request, other = Request(b"k", text="paid", again="free"), Request(b"o", text="plain")
    columns = [pa.array(["p"] * 4)]
    every = np.ones(4, np.bool_)
    asked = CallRows(columns, every, every, np.array([0, 1, 0, -1]), requests=[request, other], own=[request, other])
    assert asked.texts().tolist() == ["paid", "plain", "free", None]
    later = CallRows(columns, every, every, np.array([0, 0, -1, 1]), requests=[request, other], own=[other])
    assert later.texts().tolist() == ["free", "free", None, "plain"]


def test_the_engine_hears_of_the_form_unless_rows_bring_it() -> None:
    form = AnswerForm(kind="choices", choices=("a",), is_json=True)
    assert constraint(form) == Constraint(kind="choices", choices=("a",))
    assert constraint(AnswerForm(kind="choices", field=1)) is None
    assert constraint(None) is None


def test_what_is_told_beside_an_answer_is_no_part_of_the_question() -> None:
    plain = CallSpec(answer=AnswerForm(kind="choices", choices=("a",)))
    assert CallSpec(answer=plain.answer, details=("error",), on_error="null").canonical() == plain.canonical()
    for other in (CallSpec(), CallSpec(answer=AnswerForm(kind="choices", choices=("b",)))):
        assert other.canonical() != plain.canonical()
    assert CallSpec(truncate="longest").canonical() != CallSpec().canonical()
