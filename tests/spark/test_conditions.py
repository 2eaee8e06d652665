"""Conditions: what filters over answers become, and that tasks then judge rows as Spark does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from spark_llm.condition import UNKNOWN, evaluate
from spark_llm.optimizer.catalyst.bridge import Catalyst, items
from spark_llm.optimizer.rules.conditions import Conjunct, conjuncts, needs_all, renumbered

pytestmark = pytest.mark.spark

A, B = ["answer", 0], ["answer", 1]

ODD = (
    *("", " ", "a", "A", "b", "yes", "Yes ", " YES", "no", "true", "T", "f", "0", "1", "12", " 7 ", "-3", "007", "1.5"),
    *("1e3", "NaN", "Infinity", "+4", "99999999999", "9223372036854775808", "a%b", "a_b", "a\\b", "ab", "aab", "a\nb"),
    *("ä", "Ä", "ß", "İ", "Σς", "😀", "a😀b", "\u00a0yes", "\tyes\n", "null", "yes\x00"),
)


def rows(spark: SparkSession) -> Any:
    """A table of two answers in all combinations of odd texts and NULL, on one partition."""
    texts = [*ODD, None]
    pairs = [(one, texts[(number * 7 + 3) % len(texts)]) for number, one in enumerate(texts)]
    return spark.createDataFrame([*pairs, (None, None), *((one, one) for one in ODD)], "a string, b string")


def translated(spark: SparkSession, predicate: str, of: str = "a string, b string, c string") -> list[Conjunct]:
    """The conjuncts of ``WHERE predicate``, where a and b are answers, as Spark optimizes them."""
    df = spark.createDataFrame(spark.sparkContext.emptyRDD(), of).where(predicate)
    node = df._jdf.queryExecution().optimizedPlan()
    while node.nodeName() != "Filter":
        node = node.child()
    bottom = node.child()
    found = conjuncts(node, bottom, items(bottom.output())[:2], Catalyst.of(spark))
    # Of columns Spark knows that a comparison wants them not to be NULL.
    return [each for each in found if each.expression.nodeName() != "IsNotNull" or "IS NOT NULL" in predicate]


TREES = {
    "a = 'x'": ["=", A, ["literal", "x"]],
    "'x' = a": ["=", ["literal", "x"], A],
    "a != 'x'": ["not", ["=", A, ["literal", "x"]]],
    "a <=> 'x'": ["<=>", A, ["literal", "x"]],
    "a < b": ["<", A, B],
    "a IN ('y', 'x', NULL)": ["in", A, ["y", "x", None]],
    "a NOT IN ('y', 'x')": ["not", ["in", A, ["y", "x"]]],
    "a = 'x' OR b IS NULL": ["or", ["=", A, ["literal", "x"]], ["isnull", B]],
    "a IS NOT NULL": ["isnotnull", A],
    "lower(trim(a)) = 'yes'": ["=", ["lower", ["trim", A]], ["literal", "yes"]],
    "upper(a) >= 'Q'": [">=", ["upper", A], ["literal", "Q"]],
    "a LIKE '%x_'": ["like", A, "%x_", "\\"],
    "a LIKE 'x/%_y' ESCAPE '/'": ["like", A, "x/%_y", "/"],
    "a ILIKE '%X_'": ["like", ["lower", A], "%x_", "\\"],
    "a LIKE 'x%'": ["startswith", A, ["literal", "x"]],
    "a LIKE '%x'": ["endswith", A, ["literal", "x"]],
    "contains(a, b)": ["contains", A, B],
    "length(a) > 3": [">", ["length", A], ["literal", 3]],
    "cast(a AS int) > 3": [">", ["cast", A, "int"], ["literal", 3]],
    "try_cast(a AS double) <= 0.5D": ["<=", ["cast", A, "double"], ["literal", 0.5]],
    "cast(a AS boolean)": ["cast", A, "boolean"],
    "cast(a AS bigint) = length(b)": ["=", ["cast", A, "bigint"], ["cast", ["length", B], "bigint"]],
    "a = '\"\\\\ \t\u00e4😀'": ["=", A, ["literal", '"\\ \tä😀']],
}


@pytest.mark.parametrize(("predicate", "tree"), TREES.items(), ids=list(TREES))
def test_trees(spark: SparkSession, predicate: str, tree: list[Any]) -> None:
    [found] = translated(spark, predicate)
    assert found.condition == tree
    assert found.answers == {answer for answer in (0, 1) if str(["answer", answer]) in str(tree)}
    assert not found.is_cheap


NOT_TRANSLATED = {
    "a column": "a = c",
    "a function that tasks do not know": "a RLIKE 'x'",
    "another trim": "trim(BOTH 'x' FROM a) = 'y'",
    "a number of another kind": "cast(a AS decimal(4, 1)) > 3.5",
    "a date": "cast(a AS date) > DATE'2020-01-01'",
    "a collation": "a COLLATE UTF8_LCASE = 'x'",
    "a list that is not constant": "a IN ('x', c)",
    "a pattern that is not constant": "a LIKE c",
    "not a number": "cast(a AS double) = double('NaN')",
    "drawn": "a = 'x' OR rand() > 0.5",
}


@pytest.mark.parametrize("predicate", NOT_TRANSLATED.values(), ids=list(NOT_TRANSLATED))
def test_what_a_task_could_not_judge_is_not_translated(spark: SparkSession, predicate: str) -> None:
    found = translated(spark, predicate)
    assert [each.condition for each in found if each.answers == {0}] == [None]


def test_a_long_list_is_translated_in_one_order(spark: SparkSession) -> None:
    words = [f"w{number}" for number in range(20)]
    [found] = translated(spark, f"a IN ({', '.join(map(repr, words))})")
    assert found.condition == ["in", A, sorted(words)]


def test_conjuncts_are_told_apart(spark: SparkSession) -> None:
    found = translated(spark, "c > 'x' AND a = 'x' AND (b = 'y' OR c = 'z')")
    cheap = [each for each in found if each.is_cheap]
    assert {frozenset(each.answers) for each in found} == {frozenset(), frozenset({0}), frozenset({1})}
    assert all("c" in each.expression.sql() for each in cheap)
    assert len(cheap) == 1
    assert [each.condition for each in found if each.answers == {1}] == [None]


def test_answers_are_found_below_projections(spark: SparkSession) -> None:
    df = spark.createDataFrame(spark.sparkContext.emptyRDD(), "a string, c string").selectExpr("upper(a) AS u", "c")
    node = df.where("u = 'X'")._jdf.queryExecution().analyzed()
    bottom = node.child().child()
    [found] = conjuncts(node, bottom, items(bottom.output())[:1], Catalyst.of(spark))
    assert found.condition == ["=", ["upper", A], ["literal", "X"]]


def test_renumbered() -> None:
    tree = ["and", ["in", ["answer", 3], ["answer", None]], ["like", ["lower", ["answer", 5]], "answer", "\\"]]
    assert renumbered(tree, [5, 3]) == [
        "and",
        ["in", ["answer", 1], ["answer", None]],
        ["like", ["lower", ["answer", 0]], "answer", "\\"],
    ]
    assert renumbered(["=", ["answer", 2], ["literal", "answer"]], [2]) == ["=", ["answer", 0], ["literal", "answer"]]


X, Y = ["=", A, ["literal", "x"]], ["=", B, ["literal", "y"]]
NEEDS = [
    ([X], 1, True),
    ([["not", X]], 1, True),
    ([["isnull", A]], 1, False),
    ([["not", ["isnotnull", A]]], 1, False),
    ([["<=>", A, ["literal", "x"]]], 1, True),
    ([["<=>", A, ["literal", None]]], 1, False),
    ([X], 2, False),
    ([X, Y], 2, True),
    ([["=", A, B]], 2, True),
    ([["or", X, Y]], 2, False),
    ([X, ["isnull", B]], 2, False),
]


@pytest.mark.parametrize(("conditions", "answers", "needed"), NEEDS)
def test_a_row_needs_all_answers(conditions: list[Any], answers: int, needed: bool) -> None:
    assert needs_all(conditions, answers) == needed


LITERALS = st.sampled_from(["'x'", "'yes'", "'a'", "''", "'ä'", "'😀'", "'Q'", "NULL"])
TEXTS = st.recursive(
    st.sampled_from(["a", "b", "a"]),
    lambda inner: st.builds("{}({})".format, st.sampled_from(["lower", "upper", "trim"]), inner),
)
NUMBERS = st.one_of(
    st.builds("try_cast({} AS {})".format, TEXTS, st.sampled_from(["int", "bigint", "double"])),
    st.builds("length({})".format, TEXTS),
)
SIMPLE = st.one_of(
    st.builds(
        "{} {} {}".format, TEXTS, st.sampled_from(["=", "<", "<=", ">", ">=", "<=>", "!="]), st.one_of(TEXTS, LITERALS)
    ),
    st.builds("{} {} {}".format, NUMBERS, st.sampled_from(["=", "<", ">="]), st.sampled_from(["0", "3", "12", "1.5D"])),
    st.builds(
        "{} IN ({})".format, TEXTS, st.lists(LITERALS, max_size=12).map(lambda values: ", ".join(["'x'", *values]))
    ),
    st.builds(
        "{} LIKE '{}'".format, TEXTS, st.sampled_from(["a%", "%a", "%a%", "a_b", "a\\\\%b", "%", "_", "y%s", "😀"])
    ),
    st.builds("{}({}, {})".format, st.sampled_from(["contains", "startswith", "endswith"]), TEXTS, TEXTS),
    st.builds("{} IS {}NULL".format, TEXTS, st.sampled_from(["", "NOT "])),
    st.builds("try_cast({} AS boolean)".format, TEXTS),
)
PREDICATES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds("NOT ({})".format, inner),
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["AND", "OR"]), inner),
    ),
    max_leaves=4,
)


@settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(PREDICATES, min_size=20, max_size=25))
def test_rows_are_judged_as_by_spark(spark: SparkSession, predicates: list[str]) -> None:
    df = rows(spark)
    judged = df.selectExpr("a", "b", *(f"{predicate} AS p{number}" for number, predicate in enumerate(predicates)))
    found = judged.collect()
    sure = 0
    for number, predicate in enumerate(predicates):
        where = df.where(predicate)._jdf.queryExecution().analyzed()
        parts = conjuncts(where, where.child(), items(where.child().output()), Catalyst.of(spark))
        if any(part.condition is None for part in parts):  # a list that Spark casts: it stays Spark's affair
            continue
        condition = ["and", *(part.condition for part in parts), ["literal", True]]
        for row in found:
            mine = evaluate(condition, [row.a, row.b], [True, True])
            if mine is not UNKNOWN:
                sure += 1
                assert mine == row[f"p{number}"], (predicate, row.a, row.b)
    assert sure > len(found) * len(predicates) // 3
