"""Conditions over answers: SQL's logic, and that what is said early stays true whatever comes later."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spark_llm.condition import UNKNOWN, evaluate, judge

A, B = ["answer", 0], ["answer", 1]
YES: list[Any] = ["=", A, ["literal", "yes"]]
NO: list[Any] = ["=", B, ["literal", "no"]]


@pytest.mark.parametrize(
    ("condition", "answer", "expected"),
    [
        (YES, "yes", True),
        (YES, "Yes", False),
        (YES, None, None),
        (["=", A, ["literal", 1]], "1", UNKNOWN),
        (["<=>", A, ["literal", None]], None, True),
        (["<=>", A, ["literal", "x"]], None, False),
        (["<", A, ["literal", "é"]], "z", True),
        (["in", A, ["a", "b"]], "b", True),
        (["in", A, ["a", None]], "b", None),
        (["in", A, ["a", None]], "a", True),
        (["in", A, ["a"]], None, None),
        (["in", A, []], "a", UNKNOWN),
        (["isnull", A], None, True),
        (["isnotnull", A], None, False),
        (["not", YES], "no", True),
        (["not", YES], None, None),
        (["not", A], "true", UNKNOWN),
        (["=", ["lower", ["trim", A]], ["literal", "yes"]], "  YES ", True),
        (["=", ["trim", A], ["literal", "yes"]], "yes\n", False),
        (["=", ["lower", A], ["literal", "i"]], "İ", UNKNOWN),
        (["=", ["upper", A], ["literal", "ß"]], "ß", UNKNOWN),
        (["like", A, "y_s%", "\\"], "yes\nand more", True),
        (["like", A, "100\\%", "\\"], "100%", True),
        (["like", A, "100\\%", "\\"], "1000", False),
        (["like", A, "a/_b", "/"], "a_b", True),
        (["like", A, "bad\\x", "\\"], "x", UNKNOWN),
        (["like", A, "end\\", "\\"], "x", UNKNOWN),
        (["like", A, "a", "\\"], None, None),
        (["startswith", A, ["literal", "ye"]], "yes", True),
        (["endswith", A, ["literal", "ye"]], "yes", False),
        (["contains", A, ["literal", "e"]], "yes", True),
        (["contains", A, ["literal", None]], "yes", None),
        (["=", ["length", A], ["literal", 2]], "😀é", True),
        ([">=", ["cast", A, "int"], ["literal", 7]], " 7 ", True),
        ([">=", ["cast", A, "int"], ["literal", 7]], "7.0", UNKNOWN),
        ([">=", ["cast", A, "int"], ["literal", 7]], "4000000000", UNKNOWN),
        ([">=", ["cast", A, "bigint"], ["literal", 7]], "4000000000", True),
        ([">=", ["cast", A, "int"], ["literal", 7]], "٧", UNKNOWN),
        ([">", ["cast", A, "double"], ["literal", 1]], "1.5", True),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], '{"a":1}', True),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], '{"a":null}', None),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], '{"b":1}', None),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], '{"a":4000000000}', UNKNOWN),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], '{"a":"1"}', UNKNOWN),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], "no JSON", UNKNOWN),
        (["=", ["json", A, ["a"], "int"], ["literal", 1]], None, None),
        (["json", A, ["a", "b"], "boolean"], '{"a":{"b":true}}', True),
        (["json", A, ["a", "b"], "boolean"], '{"a":null}', None),
        (["json", A, ["a", "b"], "boolean"], '{"a":[1]}', UNKNOWN),
        ([">", ["json", A, ["a"], "double"], ["literal", 1]], '{"a":2}', True),
        ([">", ["json", A, ["a"], "double"], ["literal", 1]], '{"a":' + "9" * 400 + "}", UNKNOWN),
        (["=", ["json", A, ["a"], "string"], ["literal", "é"]], '{"a":"\\u00e9"}', True),
        ([">", ["cast", A, "double"], ["literal", 1]], "1e3", UNKNOWN),
        (["=", ["cast", A, "double"], ["literal", float("nan")]], "1", False),
        (["cast", A, "boolean"], "Yes", True),
        (["cast", A, "boolean"], "maybe", UNKNOWN),
        (["=", ["cast", ["cast", A, "int"], "string"], ["literal", "7"]], " 7", True),
        (A, "yes", UNKNOWN),
        (["soundex", A], "yes", UNKNOWN),
    ],
)
def test_one_answer(condition: list[Any], answer: str | None, expected: object) -> None:
    assert evaluate(condition, [answer], [True]) is expected


def test_what_is_not_asked_yet_is_unknown_unless_it_does_not_matter() -> None:
    early = ([None, None], [True, False])
    assert evaluate(NO, *early) is UNKNOWN
    assert evaluate(["and", YES, NO], ["no", None], [True, False]) is False
    assert evaluate(["or", YES, NO], ["yes", None], [True, False]) is True
    assert evaluate(["or", YES, NO], ["no", None], [True, False]) is UNKNOWN
    assert evaluate(["and", YES, NO], *early) is UNKNOWN  # NULL or false, as the second answer says
    assert evaluate(["=", A, B], *early) is None
    assert evaluate(["<=>", A, B], *early) is UNKNOWN


def test_a_row_is_dropped_by_one_condition_and_a_hit_by_all() -> None:
    assert judge([YES, NO], ["yes", "no"], [True, True]) is True
    assert judge([YES, NO], ["yes", None], [True, False]) is None
    assert judge([YES, NO], ["no", None], [True, False]) is False
    assert judge([YES, NO], [None, None], [True, False]) is False
    assert judge([], [None], [False]) is True


texts = st.sampled_from(["yes", "no", "Yes ", " 7", "12", "1.5", "é", "true", "", "%"])
literals = st.one_of(texts, st.integers(-3, 12), st.sampled_from([1.5, float("nan"), True, False, None]))
leaves = st.one_of(
    st.builds(lambda number: ["answer", number], st.integers(0, 2)), literals.map(lambda value: ["literal", value])
)


def larger(parts: st.SearchStrategy[list[Any]]) -> st.SearchStrategy[list[Any]]:
    """Trees over ``parts``: also ones that no SQL type checker would let pass."""
    two = ["=", "<=>", "<", "<=", ">", ">=", "and", "or", "startswith", "endswith", "contains"]
    return st.one_of(
        st.builds(lambda kind, a, b: [kind, a, b], st.sampled_from(two), parts, parts),
        st.builds(lambda a, b, c: ["or", a, b, c], parts, parts, parts),
        st.builds(
            lambda kind, a: [kind, a],
            st.sampled_from(["not", "isnull", "isnotnull", "lower", "upper", "trim", "length"]),
            parts,
        ),
        st.builds(lambda a, values: ["in", a, values], parts, st.lists(literals, max_size=3)),
        st.builds(
            lambda a, kind: ["cast", a, kind], parts, st.sampled_from(["int", "bigint", "double", "boolean", "string"])
        ),
        st.builds(lambda a, pattern: ["like", a, pattern, "\\"], parts, st.sampled_from(["%", "y_s%", "\\%", "a\\"])),
    )


@given(
    condition=st.recursive(leaves, larger, max_leaves=8),
    answers=st.lists(st.one_of(st.none(), texts), min_size=3, max_size=3),
    known=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_what_is_said_early_holds_whatever_the_other_answers_become(
    condition: list[Any], answers: list[str | None], known: list[bool]
) -> None:
    early = evaluate(
        condition,
        [answer if is_known else "never read" for answer, is_known in zip(answers, known, strict=True)],
        known,
    )
    if early is not UNKNOWN:
        assert evaluate(condition, answers, [True] * 3) is early


truths = st.sampled_from([True, False, None, UNKNOWN])


@given(first=truths, second=truths)
def test_and_or_and_not_obey_de_morgan(first: object, second: object) -> None:
    def tree(value: object) -> list[Any]:
        return ["answer", 0] if value is UNKNOWN else ["literal", value]

    def found(condition: list[Any]) -> object:
        return evaluate(condition, [None], [False])

    a, b = tree(first), tree(second)
    assert found(["not", ["and", a, b]]) is found(["or", ["not", a], ["not", b]])
    assert found(["and", a, b]) is found(["and", b, a])
    assert found(["or", a, b]) is found(["or", b, a])
    assert found(["not", ["not", a]]) is first
