"""MaskConditionalCalls: a call is made for the rows that need its value, and no row's value changes."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plans import context, optimized, specs, text
from pyspark import cloudpickle
from pyspark.sql import SparkSession
from pyspark.sql.functions import pandas_udf

import spark_llm
from spark_llm import config
from spark_llm.functions.registry import Registry
from spark_llm.optimizer.rules.mask_conditional_calls import mask_conditional_calls

pytestmark = pytest.mark.spark

cloudpickle.register_pickle_by_value(__import__(__name__))


def answer(arguments: list[str | None]) -> str | None:
    """A digit or letter of sixteen; one of them is NULL."""
    digit = hashlib.md5(json.dumps(arguments).encode()).hexdigest()[0]
    return None if digit == "f" else digit


def fake_digits_udf(folder: str) -> Any:
    """Stands in for the real UDF: answers with ``answer`` where the mask is true and writes down what it was asked."""

    def fake_digits(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        for spec, *columns in batches:
            found: list[str | None] = []
            with (Path(folder) / uuid.uuid4().hex).open("w") as file:
                for row in zip(*columns, strict=True):
                    given = [None if pd.isna(value) else value for value in row]
                    if '"masked":true' in spec[0] and given.pop() is not True:
                        found.append(None)
                    else:
                        file.write(json.dumps(given) + "\n")
                        found.append(answer(given))
            yield pd.Series(found, dtype=object)

    fake_digits.__annotations__ = {"batches": Iterator[tuple[pd.Series, ...]], "return": Iterator[pd.Series]}
    return pandas_udf(fake_digits, "string")


@dataclass(frozen=True)
class Digits:
    """A session whose calls answer digits, with only the rule at hand; ``asked``: the calls since the last time."""

    spark: SparkSession
    folder: Path

    def asked(self) -> list[tuple[str, ...]]:
        lines = [line for file in self.folder.iterdir() for line in file.read_text().splitlines()]
        for file in self.folder.iterdir():
            file.unlink()
        return sorted(map(tuple, map(json.loads, lines)), key=str)

    def rows(self, query: str, is_on: bool = True) -> tuple[list[tuple[Any, ...]], list[tuple[str, ...]]]:
        """The rows of the query and the calls made for them."""
        self.spark.conf.set("spark.llm.optimizer.enabled", str(is_on).lower())
        try:
            return sorted(map(tuple, self.spark.sql(query).collect()), key=str), self.asked()
        finally:
            self.spark.conf.unset("spark.llm.optimizer.enabled")
            self.asked()


@pytest.fixture
def digits(spark: SparkSession, tmp_path: Path) -> Iterator[Digits]:
    spark_llm.enable(spark.newSession())
    registry = Registry.of(spark)
    udf = fake_digits_udf(str(tmp_path))
    with registry.using(spark, lambda tables, calls=0: udf):
        session = spark_llm.enable(spark.newSession())
        for key in config.entries():
            if key.startswith("spark.llm.optimizer.") and key.endswith(".enabled") and key.count(".") == 4:
                session.conf.set(key, key == "spark.llm.optimizer.maskConditionalCalls.enabled")
        rows = ", ".join(f"({','.join(map(sql_value, row.values()))})" for row in ROWS)
        session.sql(f"SELECT * FROM VALUES {rows} AS t({', '.join(ROWS[0])})").repartition(
            2
        ).cache().createOrReplaceTempView("t")
        session.table("t").count()
        yield Digits(session, tmp_path)
        session.catalog.uncacheTable("t")


def sql_value(value: object) -> str:
    return "NULL" if value is None else json.dumps(value)


# Each combination that matters: NULL, true and false; a divisor that is zero; texts that are NULL.
ROWS: list[dict[str, Any]] = [
    {"id": number, "a": a, "b": number % 3, "c": c, "x": x}
    for number, (a, c, x) in enumerate(
        (a, c, x) for a in (None, 1, 3) for c in (None, True, False) for x in (None, "5", "u")
    )
]

# A tiny interpreter of what the rule promises


class Node:
    """An expression: its SQL text and its value for a row. calls: does it hold one? safe: can it not fail?"""

    sql: str
    calls: bool = False
    safe: bool = True

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        """The value, or None for false where ``only_true``; puts the calls that are needed for it into ``asked``."""
        raise NotImplementedError


class DivisionByZero(Exception):
    pass


class Cheap(Node):
    def __init__(self, sql: str, value: Callable[[dict[str, Any]], Any], safe: bool = True) -> None:
        self.sql, self._value, self.safe = sql, value, safe

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        return self._value(row)


class Composed(Node):
    def __init__(self, *parts: Node) -> None:
        self.parts = parts
        self.calls = any(part.calls for part in parts)
        self.safe = all(part.safe for part in parts)


class Call(Composed):
    def __init__(self, number: int, *fields: Node) -> None:
        super().__init__(*fields)
        self.prompt, self.calls = f"p{number}", True
        self.sql = f"llm('{self.prompt}', id{''.join(f', f{i} => {field.sql}' for i, field in enumerate(fields))})"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        arguments = [self.prompt, str(row["id"]), *(part.value(row, asked) for part in self.parts)]
        asked.add(tuple(arguments))
        return answer(arguments)


class Less(Composed):
    """Half of all answers are less than '8'."""

    def __init__(self, part: Node) -> None:
        super().__init__(part)
        self.sql = f"({part.sql} < '8')"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        found = self.parts[0].value(row, asked)
        return None if found is None else found < "8"


class Junction(Composed):
    def __init__(self, word: str, one: Node, other: Node) -> None:
        super().__init__(one, other)
        self.word, self.sql = word, f"({one.sql} {word} {other.sql})"

    def operands(self) -> list[Node]:
        found: list[Node] = []
        for part in self.parts:
            found += part.operands() if isinstance(part, Junction) and part.word == self.word else [part]
        return found

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        return junction(self.word, self.operands(), row, asked, only_true)


def junction(word: str, operands: list[Node], row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool) -> Any:
    decides, result = word == "OR", word == "AND"
    for operand in sorted(operands, key=lambda operand: operand.calls or not operand.safe):
        found: Any = operand.value(row, asked, only_true)
        if found is decides or (word == "AND" and only_true and found is not True):
            return decides
        result = None if found is None else result
    return result


class Negation(Composed):
    def __init__(self, part: Node) -> None:
        super().__init__(part)
        self.sql = f"(NOT {part.sql})"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        part = self.parts[0]
        if isinstance(part, Negation):
            return part.parts[0].value(row, asked, only_true)
        if isinstance(part, Junction):  # as Spark's own rules write it first
            word = "OR" if part.word == "AND" else "AND"
            return junction(word, [Negation(operand) for operand in part.operands()], row, asked, only_true)
        found = part.value(row, asked)
        return None if found is None else not found


class Choice(Composed):
    def __init__(self, condition: Node, one: Node, other: Node) -> None:
        super().__init__(condition, one, other)
        self.sql = f"IF({condition.sql}, {one.sql}, {other.sql})"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        condition, one, other = self.parts
        return (one if condition.value(row, asked, True) is True else other).value(row, asked, only_true)


class Case(Composed):
    def __init__(self, *parts: Node) -> None:
        super().__init__(*parts)
        first, second = self.parts[:2], self.parts[2:4]
        whens = " ".join(f"WHEN {when.sql} THEN {then.sql}" for when, then in (first, second))
        self.sql = f"CASE {whens}{f' ELSE {parts[4].sql}' if len(parts) > 4 else ''} END"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        for number in (0, 2):
            if self.parts[number].value(row, asked, True) is True:
                return self.parts[number + 1].value(row, asked, only_true)
        return self.parts[4].value(row, asked, only_true) if len(self.parts) > 4 else None


class First(Composed):
    def __init__(self, *parts: Node) -> None:
        super().__init__(*parts)
        self.sql = f"coalesce({', '.join(part.sql for part in parts)})"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        return next((found for part in self.parts if (found := part.value(row, asked)) is not None), None)


class NullIf(Composed):
    def __init__(self, one: Node, other: Node) -> None:
        super().__init__(one, other)
        self.sql = f"nullif({one.sql}, {other.sql})"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        one, other = (part.value(row, asked) for part in self.parts)
        return None if one is not None and one == other else one


class Among(Composed):
    def __init__(self, *parts: Node) -> None:
        super().__init__(*parts)
        self.sql = f"({parts[0].sql} IN ({', '.join(part.sql for part in parts[1:])}))"

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        wanted = self.parts[0].value(row, asked)
        if wanted is None:
            return None
        result: Any = False
        for part in sorted(self.parts[1:], key=lambda part: part.calls or not part.safe):
            found = part.value(row, asked)
            if found is not None and found == wanted:
                return True
            result = None if found is None else result
        return result


def quotient(ansi: bool) -> Node:
    def value(row: dict[str, Any]) -> Any:
        if row["b"]:
            return 6 / row["b"] > 4
        if ansi:
            raise DivisionByZero
        return None

    return Cheap("(6 / b > 4)", value, safe=False)


def quotient_text(ansi: bool) -> Node:
    def value(row: dict[str, Any]) -> Any:
        if row["b"]:
            return str(6 / row["b"])
        if ansi:
            raise DivisionByZero
        return None

    return Cheap("string(6 / b)", value, safe=False)


def expressions(ansi: bool) -> tuple[st.SearchStrategy[Node], st.SearchStrategy[Node]]:
    """Strategies of BOOLEAN and of STRING expressions."""
    booleans: st.SearchStrategy[Node] = st.deferred(lambda: conditions)
    strings: st.SearchStrategy[Node] = st.deferred(lambda: texts)
    cheap = st.sampled_from(
        [
            Cheap("c", lambda row: row["c"]),
            Cheap("(a > 2)", lambda row: None if row["a"] is None else row["a"] > 2),
            Cheap("(a IS NULL)", lambda row: row["a"] is None),
            Cheap("(b <> 0)", lambda row: row["b"] != 0),
            Cheap("(x = '5')", lambda row: None if row["x"] is None else row["x"] == "5"),
            quotient(ansi),
        ]
    )
    number = st.integers(0, 99)
    field = st.sampled_from([Cheap("x", lambda row: row["x"]), quotient_text(ansi)])
    call = st.one_of(st.builds(Call, number), st.builds(Call, number, field), st.builds(Call, number, strings))
    conditions = st.one_of(
        cheap,
        st.builds(Less, call),
        st.builds(Less, strings),
        st.builds(Junction, st.just("AND"), booleans, booleans),
        st.builds(Junction, st.just("OR"), booleans, booleans),
        st.builds(Negation, booleans),
        st.builds(Choice, booleans, booleans, booleans),
        st.builds(First, booleans, booleans),
        st.builds(Among, strings, strings, strings),
    )
    column = st.just(Cheap("x", lambda row: row["x"]))
    texts = st.one_of(
        column,
        call,
        call,
        st.builds(Choice, booleans, strings, strings),
        st.builds(Case, booleans, strings, booleans, strings),
        st.builds(Case, booleans, strings, booleans, strings, strings),
        st.builds(First, strings, strings, strings),
        st.builds(NullIf, strings, strings),
    )
    return conditions, texts


def needed(expressions: list[Node], row: dict[str, Any]) -> tuple[list[Any], set[tuple[str, ...]]] | None:
    """The values of the expressions and the calls that they need; None if that fails."""
    asked: set[tuple[str, ...]] = set()
    try:
        return [expression.value(row, asked) for expression in expressions], asked
    except DivisionByZero:
        return None


relaxed = settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("ansi", [True, False])
def test_exactly_the_rows_that_need_a_value_are_asked(digits: Digits, ansi: bool) -> None:
    digits.spark.conf.set("spark.sql.ansi.enabled", ansi)
    conditions, texts = expressions(ansi)

    @relaxed
    @given(st.lists(st.one_of(conditions, texts).filter(lambda node: node.calls), min_size=1, max_size=6))
    def check(selected: list[Node]) -> None:
        found = {row["id"]: each for row in ROWS if (each := needed(selected, row)) is not None}
        columns = ", ".join(f"{node.sql} AS e{number}" for number, node in enumerate(selected))
        query = f"SELECT id, {columns} FROM t WHERE id IN ({', '.join(map(str, found)) or -1})"
        values, asked = digits.rows(query)
        assert values == sorted(((key, *each) for key, (each, _) in found.items()), key=str), query
        assert set(asked) == set().union(*(calls for _, calls in found.values())), query

    check()


@pytest.mark.parametrize("ansi", [True, False])
def test_filters_ask_no_row_that_their_conditions_spare(digits: Digits, ansi: bool) -> None:
    digits.spark.conf.set("spark.sql.ansi.enabled", ansi)
    conditions, _ = expressions(ansi)

    @relaxed
    @given(st.lists(conditions, min_size=1, max_size=3).filter(lambda nodes: any(node.calls for node in nodes)))
    def check(conjuncts: list[Node]) -> None:
        whole = conjuncts[0]
        for conjunct in conjuncts[1:]:
            whole = Junction("AND", whole, conjunct)
        found = {row["id"]: each for row in ROWS if (each := needed([Kept(whole)], row)) is not None}
        query = f"SELECT id FROM (SELECT * FROM t WHERE id IN ({', '.join(map(str, found)) or -1})) WHERE {whole.sql}"
        values, asked = digits.rows(query)
        assert values == sorted(((key,) for key, ([kept], _) in found.items() if kept is True), key=str), query
        least = set().union(*(calls for _, calls in found.values()))
        assert least <= set(asked), query
        # Conjuncts with calls are put in order by another rule.
        if sum(conjunct.calls for conjunct in conjuncts_of(whole)) == 1:
            assert least == set(asked), query

    check()


class Kept(Composed):
    """What a filter makes of its condition: Spark asks all conjuncts without calls before it asks the others."""

    def value(self, row: dict[str, Any], asked: set[tuple[str, ...]], only_true: bool = False) -> Any:
        ordered = sorted(conjuncts_of(self.parts[0]), key=lambda conjunct: conjunct.calls)
        return all(conjunct.value(row, asked, True) is True for conjunct in ordered)


def conjuncts_of(node: Node) -> list[Node]:
    """As Spark splits a condition, after it has moved NOT inwards."""
    if isinstance(node, Junction) and node.word == "AND":
        return [each for part in node.parts for each in conjuncts_of(part)]
    if isinstance(node, Negation):
        part = node.parts[0]
        if isinstance(part, Negation):
            return conjuncts_of(part.parts[0])
        if isinstance(part, Junction) and part.word == "OR":
            return [each for side in part.parts for each in conjuncts_of(Negation(side))]
    return [node]


@pytest.mark.slow
def test_shared_calls_are_asked_where_any_of_their_places_needs_them(digits: Digits) -> None:
    conditions, texts = expressions(ansi=False)
    digits.spark.conf.set("spark.sql.ansi.enabled", False)
    shared = Call(0)
    guarded = st.builds(Choice, conditions, st.just(shared), texts)

    @relaxed
    @given(st.lists(guarded, min_size=2, max_size=4))
    def check(selected: list[Node]) -> None:
        found = {row["id"]: each for row in ROWS if (each := needed(selected, row)) is not None}
        columns = ", ".join(f"{node.sql} AS e{number}" for number, node in enumerate(selected))
        query = f"SELECT id, {columns} FROM t"
        values, asked = digits.rows(query)
        assert values == sorted(((key, *each) for key, (each, _) in found.items()), key=str), query
        ours = [call for call in asked if call[0] == "p0" and len(call) == 2]
        assert len(ours) == len(set(ours)), query  # one call, not one for each place
        least = set().union(*(calls for _, calls in found.values()))
        assert least <= set(asked), query

    check()


SHAPES = {
    "CASE": ("SELECT CASE WHEN a = 1 THEN llm('p', id) END FROM t", 9),
    "an ELSE": ("SELECT CASE WHEN a = 1 THEN 'one' ELSE llm('p', id) END FROM t", 18),
    "coalesce": ("SELECT coalesce(x, llm('p', id)) FROM t", 9),
    "nvl": ("SELECT nvl(x, llm('p', id)) FROM t", 9),
    "nullif needs both": ("SELECT nullif(llm('p', id), x) FROM t", 27),
    "OR in a filter": ("SELECT * FROM t WHERE c OR llm('p', id) < '8'", 18),
    "AND in a projection, NULL is not false": ("SELECT c AND llm('p', id) < '8' FROM t", 18),
    "the cheap side second": ("SELECT llm('p', id) < '8' AND c FROM t", 18),
    "AND below IF, NULL is false": ("SELECT IF(c AND llm('p', id) < '8', 1, 2) FROM t", 9),
    "IN": ("SELECT x IN ('u', llm('p', id)) FROM t", 9),
    "an aggregate's filter": ("SELECT max(llm('p', id)) FILTER (WHERE a = 3) FROM t", 9),
    "an aggregate's argument": ("SELECT b, max(CASE WHEN a = 3 THEN llm('p', id) END) FROM t GROUP BY b", 9),
    "a call for groups": ("SELECT CASE WHEN count(*) > 9 THEN llm('p', b) END FROM t GROUP BY b", 0),
    "an aggregate under CASE needs all rows": (
        "SELECT CASE WHEN b = 0 THEN max(llm('p', id)) END FROM t GROUP BY b",
        27,
    ),
    "a key": ("SELECT count(*) FROM t GROUP BY CASE WHEN a = 1 THEN llm('p', id) END", 9),
    "a window": ("SELECT max(CASE WHEN a = 1 THEN llm('p', id) END) OVER (PARTITION BY b) FROM t", 9),
    "a generator": ("SELECT explode(array(x, CASE WHEN a = 1 THEN llm('p', id) END)) FROM t", 9),
    "always needed elsewhere": ("SELECT llm('p', id), CASE WHEN a = 1 THEN llm('p', id) END FROM t", 27),
    "needed under either": ("SELECT IF(a = 1, llm('p', id), ''), IF(a = 3, llm('p', id), '') FROM t", 18),
    "an inner join's condition": (
        "SELECT 1 FROM t JOIN t AS u ON t.id = u.id AND (t.c OR llm('p', t.id, u.x) < '8')",
        18,
    ),
    "drawn without a seed": ("SELECT CASE WHEN a = 1 THEN llm('p', id, temperature => 1.0) END FROM t", 27),
    "a condition that is drawn": ("SELECT CASE WHEN rand() < 2 THEN llm('p', id) END FROM t", 27),
}


@pytest.mark.parametrize(("query", "calls"), SHAPES.values(), ids=list(SHAPES))
def test_the_calls_of_a_shape(digits: Digits, query: str, calls: int) -> None:
    values, asked = digits.rows(query)
    assert len(asked) == calls
    assert values == digits.rows(query, is_on=False)[0]


def test_errors_stay_behind_their_conditions(digits: Digits) -> None:
    """Of b = 0 stock Spark evaluates neither quotient; nor do masks and arguments."""
    digits.spark.conf.set("spark.sql.ansi.enabled", True)
    for query, calls in (
        ("SELECT CASE WHEN b <> 0 THEN CASE WHEN 6 / b > 4 THEN llm('p', id) END END FROM t", 9),
        ("SELECT b <> 0 AND 6 / b > 4 AND llm('p', id) < '8' FROM t", 9),
        ("SELECT id FROM t WHERE llm('q', b) IS NOT NULL AND (b = 0 OR 6 / b > 4 OR llm('p', id) < '8')", 9),
    ):
        values, asked = digits.rows(query)
        assert values == digits.rows(query, is_on=False)[0]
        assert sum(call[0] == "p" for call in asked) == calls
    query = "SELECT CASE WHEN b <> 0 THEN llm('p', string(6 / b)) END FROM t"
    values, asked = digits.rows(query)
    assert len(asked) == 18
    with pytest.raises(Exception, match="DIVIDE_BY_ZERO"):
        digits.rows(query, is_on=False)


def test_the_plan_shows_the_mask(echo: SparkSession) -> None:
    echo.range(4).selectExpr("id", "string(id) AS text").createOrReplaceTempView("t")
    df = echo.sql("SELECT id, CASE WHEN id = 1 THEN llm('p', text) WHEN id = 2 THEN llm('q', text) END AS r FROM t")
    echo.conf.set("spark.llm.optimizer.fuseCalls.enabled", False)
    echo.conf.set("spark.llm.optimizer.reorderRows.enabled", False)
    assert [spec.masked for spec in specs(df)] == [True, True]
    shown = text(df)
    assert "text, (id = 1))]" in shown
    assert "text, (NOT (id = 1) AND (id = 2)))]" in shown


def test_a_call_with_a_mask_is_done(echo: SparkSession) -> None:
    echo.range(4).selectExpr("id", "string(id) AS text").createOrReplaceTempView("t")
    df = echo.sql("SELECT CASE WHEN id = 1 THEN llm('p', text) END, id = 3 OR llm('q', text) = 'x' FROM t")
    analyzed = df._jdf.queryExecution().analyzed()
    once = mask_conditional_calls(analyzed, context(echo))
    assert not once.fastEquals(analyzed)
    assert mask_conditional_calls(once, context(echo)).fastEquals(once)
    plain = echo.sql("SELECT llm('p', text) FROM t WHERE llm('q', text) = 'x' AND id > 1")
    analyzed = plain._jdf.queryExecution().analyzed()
    assert mask_conditional_calls(analyzed, context(echo)).fastEquals(analyzed)


def test_notes_say_what_was_done_and_why_not(echo: SparkSession) -> None:
    with Registry.of(echo).planner.noting() as notes:
        optimized(echo.sql("SELECT CASE WHEN id = 1 THEN llm('p', id) END FROM range(3)"))
        optimized(echo.sql("SELECT CASE WHEN rand() < 1 THEN llm('q', id) END FROM range(3)"))
    found = {(note.call, note.fired): note.why for note in notes.all() if note.rule == "maskConditionalCalls"}
    assert found["p", True] == "asked only where (id = 1L)"
    assert found["q", False] == "a condition around it is not deterministic"


@pytest.mark.slow
def test_a_chain_of_many_calls_stays_small(digits: Digits) -> None:
    """Each call of a chain waits for all before it, whose masks are not copied into each other without end."""
    chain = " AND ".join(f"llm('p{number}', id) < 'e'" for number in range(14))
    query = f"SELECT {chain} FROM t"
    values, asked = digits.rows(query)
    assert values == digits.rows(query, is_on=False)[0]
    assert len(asked) < 14 * 27
