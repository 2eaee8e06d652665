"""Typed answers in queries: types while the query is analysed, values when it runs, one call where one is enough."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fake_counting
import pytest
from drawn_answers import drawn, types, written
from fake_counting import FakeModel
from hypothesis import given, settings
from pyspark.errors import AnalysisException, PythonException
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BooleanType, IntegerType, StructType

from spark_llm.functions import llm, try_llm
from spark_llm.functions.answer import answer_of

pytestmark = pytest.mark.spark

Ask = Callable[[Callable[[str], str]], FakeModel]


@pytest.fixture
def ask(spark: SparkSession, tmp_path: Path) -> Iterator[Ask]:
    """Makes a model that answers each message (prompt and fields) as a function says."""
    opened: list[AbstractContextManager[FakeModel]] = []

    def make(answers: Callable[[str], str]) -> FakeModel:
        opened.append(fake_counting.fake_model(spark, tmp_path, reads_order=True, answers=answers))
        return opened[-1].__enter__()

    yield make
    for context in reversed(opened):
        context.__exit__(None, None, None)


ROWS = "(SELECT id, concat('row ', id) AS text FROM range(0, 6, 1, 2))"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("returns => 'BOOLEAN'", "boolean"),
        ("returns => 'INT'", "int"),
        ("returns => 'BIGINT'", "bigint"),
        ("returns => 'DOUBLE'", "double"),
        ("returns => 'DECIMAL(12, 2)'", "decimal(12,2)"),
        ("returns => 'DATE'", "date"),
        ("returns => 'TIMESTAMP'", "timestamp"),
        ("returns => 'TIMESTAMP_NTZ'", "timestamp_ntz"),
        ("returns => 'VARCHAR(20)'", "string"),
        ("returns => \"ENUM<'a', 'b'>\"", "string"),
        ("choices => array('a', 'b')", "string"),
        ("choices => array(text, 'b')", "string"),
        ("regex => '[a-z]+'", "string"),
        ("returns => 'ARRAY<INT>'", "array<int>"),
        ("returns => 'ARRAY<STRING>', choices => array('a', 'b')", "array<string>"),
        ("returns => 'MAP<STRING, DATE>'", "map<string,date>"),
        ("returns => 'a INT, b STRING'", "struct<a:int,b:string>"),
        ("returns => 'STRUCT<a: STRUCT<b: ARRAY<DOUBLE>>>'", "struct<a:struct<b:array<double>>>"),
        ('schema => \'{"type": "object", "properties": {"n": {"type": "integer"}}}\'', "struct<n:bigint>"),
        ("failOnError => false", "struct<result:string,errorMessage:string>"),
        ("returns => 'INT', failOnError => false", "struct<result:int,errorMessage:string>"),
        ("returns => 'BOOLEAN', confidence => true", "struct<result:boolean,confidence:double>"),
        (
            "usage => true",
            "struct<result:string,usage:struct<prompt_tokens:bigint,cached_tokens:bigint,output_tokens:bigint>>",
        ),
        ("failOnError => true", "string"),
    ],
)
def test_the_type_is_known_before_anything_runs(model: FakeModel, options: str, expected: str) -> None:
    df = model.spark.sql(f"SELECT llm('p', text, {options}) AS a FROM {ROWS}")
    assert df.schema["a"].dataType.simpleString() == expected
    assert model.requests() == []


def test_conditions_and_fields_type_check(model: FakeModel) -> None:
    spark = model.spark
    assert spark.sql(f"SELECT id FROM {ROWS} WHERE llm('p', text, returns => 'BOOLEAN')").columns == ["id"]
    found = spark.sql(f"SELECT llm('p', text, returns => 'STRUCT<a: INT, b: ARRAY<DATE>>').b[0] AS b FROM {ROWS}")
    assert found.schema["b"].dataType.simpleString() == "date"
    with pytest.raises(AnalysisException, match="DATATYPE_MISMATCH"):
        spark.sql(f"SELECT id FROM {ROWS} WHERE llm('p', text, returns => 'INT')")
    with pytest.raises(AnalysisException, match="FIELD_NOT_FOUND"):
        spark.sql(f"SELECT llm('p', text, returns => 'STRUCT<a: INT>').c FROM {ROWS}")
    assert model.requests() == []


VALUES = [
    ("BOOLEAN", "true", True),
    ("INT", "-7", -7),
    ("DOUBLE", "2.5", 2.5),
    ("DECIMAL(5,2)", "12.5", decimal.Decimal("12.50")),
    ("DATE", "2024-02-29", datetime.date(2024, 2, 29)),
    ("TIMESTAMP_NTZ", "2024-02-29T01:02:03", datetime.datetime(2024, 2, 29, 1, 2, 3)),
    ("STRING", "free text", "free text"),
    ("ENUM<'a', 'b'>", "b", "b"),
    ("ARRAY<INT>", "[1, 2]", [1, 2]),
    ("MAP<STRING, DATE>", '{"k": "2024-01-01"}', {"k": datetime.date(2024, 1, 1)}),
    ("STRUCT<a: INT, b: STRUCT<c: STRING>>", '{"a": null, "b": {"c": "é\\n"}}', Row(a=None, b=Row(c="é\n"))),
]


@pytest.mark.parametrize("details", ["", ", failOnError => false"])
def test_values(ask: Ask, details: str) -> None:
    """The same values with and without details; the model is told the form, and the engine held to it."""
    texts = {f"p{number}": text for number, (_, text, _) in enumerate(VALUES)}
    model = ask(lambda message: next(texts[line] for line in message.split("\n") if line in texts))
    columns = [
        f"llm('p{number}', f => 'x', returns => \"{ddl}\"{details}) AS v{number}"
        for number, (ddl, _, _) in enumerate(VALUES)
    ]
    [row] = model.spark.sql(f"SELECT {', '.join(columns)}").collect()
    found = [value.result if details else value for value in row]
    assert found == [value for _, _, value in VALUES]
    assert not details or all(value.errorMessage is None for value in row)
    instructions = {segment for request in model.requests() for segment in request.segments if segment != "f: x\n"}
    assert len(instructions) == len(VALUES)
    assert instructions >= {"p0\nAnswer true or false.\n", "p6\n", "p8\nAnswer in JSON: [integer, ...]\n"}


def test_every_text_that_a_constraint_lets_through_is_parsed_by_spark(echo: SparkSession) -> None:
    """Types and texts at random, through the same expressions that calls have: no NULL that the text has not."""
    samples: list[tuple[str, str, Any]] = []

    @given(types())
    @settings(derandomize=True, deadline=None, max_examples=120, database=None)
    def draw(answer: Any) -> None:
        found = answer_of({"returns": written(answer)})
        text = None if found.form is None else drawn(found.form, random.Random(len(samples)))
        if text is not None:
            value = json.loads(text) if found.form is not None and found.form.is_json else text
            samples.append((found.type.ddl, text, value))

    draw()
    assert len(samples) > 50
    row = echo.range(1).select(
        *(
            (
                F.from_json(F.lit(text), ddl)
                if ddl.startswith(("STRUCT", "ARRAY", "MAP"))
                else F.lit(text).try_cast(ddl)
            ).alias(f"c{number}")
            for number, (ddl, text, _) in enumerate(samples)
        )
    )
    [found] = row.collect()
    lost = [sample for sample, value in zip(samples, found, strict=True) if not same(sample[2], value)]
    assert lost == []


def same(value: Any, found: Any) -> bool:
    """Does what Spark read have the shape of the JSON value, with its NULLs and no others?"""
    if value is None or found is None:
        return value is found
    if isinstance(value, list):
        return len(value) == len(found) and all(map(same, value, found))
    if isinstance(value, dict):
        parts = found.asDict() if isinstance(found, Row) else found
        return value.keys() == parts.keys() and all(same(part, parts[name]) for name, part in value.items())
    return isinstance(value, bool | str) or float(found) == pytest.approx(float(value))


def test_fields_of_one_answer_are_one_call(ask: Ask) -> None:
    model = ask(lambda message: '{"a": 1, "b": "x"}')
    call = "llm('p', text, returns => 'STRUCT<a: INT, b: STRING>')"
    rows = model.spark.sql(f"SELECT id, {call}.a AS a, {call}.b AS b FROM {ROWS} WHERE {call}.a = 1").collect()
    assert [(row.a, row.b) for row in rows] == [(1, "x")] * 6
    assert len(model.requests()) == 6


def test_a_filter_and_a_column_are_one_call(ask: Ask) -> None:
    model = ask(lambda message: str(message.rstrip().endswith(("0", "2", "4"))).lower())
    call = "llm('even?', text, returns => 'BOOLEAN')"
    rows = model.spark.sql(f"SELECT id, {call} AS even FROM {ROWS} WHERE {call}").collect()
    assert [(row.id, row.even) for row in rows] == [(0, True), (2, True), (4, True)]
    assert len(model.requests()) == 6


def test_a_limit_stops_a_typed_filter(ask: Ask) -> None:
    model = ask(lambda message: "true")
    source = "(SELECT id, concat('row ', id) AS text FROM range(0, 400, 1, 2))"
    rows = model.spark.sql(f"SELECT id FROM {source} WHERE llm('p', text, returns => 'BOOLEAN') LIMIT 5").collect()
    assert len(rows) == 5
    assert len(model.requests()) <= 2 * 5 + 16


def test_a_limit_stops_a_filter_on_fields_of_an_answer(ask: Ask) -> None:
    model = ask(lambda message: json.dumps({"s": {"n": int(message.split()[-1]) % 2}, "ok": True}))
    source = "(SELECT id, concat('row ', id) AS text FROM range(0, 400, 1, 2))"
    call = "llm('p', text, returns => 'STRUCT<s: STRUCT<n: INT>, ok: BOOLEAN>')"
    rows = model.spark.sql(f"SELECT id FROM {source} WHERE {call}.s.n = 1 AND {call}.ok LIMIT 3").collect()
    assert len(rows) == 3
    assert all(row.id % 2 for row in rows)
    assert len(model.requests()) <= 2 * 2 * 3 + 16
    model.forget()
    call = "llm('p', text, returns => 'STRUCT<ok: BOOLEAN>', failOnError => false)"
    rows = model.spark.sql(f"SELECT id FROM {source} WHERE {call}.result.ok LIMIT 3").collect()
    assert len(rows) == 3
    assert len(model.requests()) <= 2 * 3 + 16


def test_a_typed_call_joins(ask: Ask) -> None:
    model = ask(lambda message: str("a: 1" in message and "b: 2" in message).lower())
    rows = model.spark.sql(
        "SELECT l.a, r.b FROM VALUES (1), (2) AS l(a) JOIN VALUES (1), (2) AS r(b)"
        " ON llm('match?', l.a, r.b, returns => 'BOOLEAN')"
    ).collect()
    assert [tuple(row) for row in rows] == [(1, 2)]
    assert len(model.requests()) == 4


def test_rows_with_choices_of_their_own(ask: Ask) -> None:
    model = ask(lambda message: "b" if "b" in message.split("choices:")[1] else "q")
    rows = model.spark.sql(
        "SELECT id, llm('pick', t, choices => c) AS a"
        " FROM VALUES (1, 'x', array('a', 'b')), (2, 'x', array('c')), (3, 'x', NULL), (4, 'x', array()),"
        " (5, NULL, array('b')), (6, 'x', array('b', NULL)) AS v(id, t, c) ORDER BY id"
    ).collect()
    assert [row.a for row in rows] == ["b", None, None, None, None, "b"]
    assert sorted(request.choices or () for request in model.requests()) == [("a", "b"), ("b",), ("c",)]
    [first] = {request.segments[0] for request in model.requests()}
    assert first == "pick\nAnswer with one of the choices.\n"


def test_the_engine_is_told_the_form(ask: Ask) -> None:
    model = ask(lambda message: '{"a": "x"}')
    model.spark.sql("SELECT llm('p', f => 'x', returns => \"STRUCT<a: ENUM<'x', 'y'> NOT NULL>\")").collect()
    [request] = model.requests()
    assert request.constraint is not None
    assert request.constraint["kind"] == "json_schema"
    assert json.loads(request.constraint["text"])["properties"] == {"a": {"type": "string", "enum": ["x", "y"]}}


def test_rows_that_fail(ask: Ask) -> None:
    """As NULL, as the query's error, or told beside the answer; whatever the session says."""
    model = ask(lambda message: "7")
    rows = "VALUES ('ok'), ('fail') AS v(t)"
    spark = model.spark
    told = "SELECT t, llm('p', t, returns => 'INT', failOnError => false) AS a"
    for setting in ("null", "fail"):
        spark.sql(f"SET spark.llm.onError = {setting}")
        ok, failed = spark.sql(f"{told} FROM {rows} ORDER BY t DESC").collect()
        assert ok.a == Row(result=7, errorMessage=None)
        assert failed.a.result is None
        assert failed.a.errorMessage.startswith("[LLM_FAKE]")
        nulls = spark.sql(f"SELECT try_llm('p', t, returns => 'INT') AS a FROM {rows} ORDER BY t DESC").collect()
        assert [row.a for row in nulls] == [7, None]
        with pytest.raises(PythonException, match="LLM_ROW_FAILED"):
            spark.sql(f"SELECT llm('p', t, failOnError => true) FROM {rows}").collect()


def test_an_answer_of_another_form_is_an_error_of_its_row(ask: Ask) -> None:
    """Backends that do not keep to forms cannot break a query."""
    model = ask(lambda message: "maybe")
    ddls = ["BOOLEAN", "INT", "DATE", "STRUCT<a: INT>", "ENUM<'a'>"]
    columns = [f"llm('p', f => 'x', returns => \"{ddl}\", failOnError => false) AS v{n}" for n, ddl in enumerate(ddls)]
    [row] = model.spark.sql(f"SELECT {', '.join(columns)}").collect()
    assert [value.result for value in row] == [None] * len(ddls)
    assert all("[LLM_INVALID_ANSWER]" in value.errorMessage and "'maybe'" in value.errorMessage for value in row)


def test_details_of_rows_without_a_question_are_null(ask: Ask) -> None:
    model = ask(lambda message: "1")
    [row] = model.spark.sql("SELECT llm('p', f => CAST(NULL AS STRING), failOnError => false) AS a").collect()
    assert row.a is None
    assert model.requests() == []


def test_usage_adds_up_to_what_the_query_cost(ask: Ask) -> None:
    """Rows with equal arguments cost once."""
    model = ask(lambda message: "a")
    rows = model.spark.sql(
        "SELECT llm('p', t, usage => true).usage AS u FROM (SELECT 'x' AS t FROM range(0, 5, 1, 1))"
    ).collect()
    paid = [row.u for row in rows if row.u != Row(prompt_tokens=0, cached_tokens=0, output_tokens=0)]
    assert len(rows) == 5
    assert len(model.requests()) == len(paid) == 1
    assert paid[0].prompt_tokens > paid[0].cached_tokens == 5
    assert paid[0].output_tokens == 3


def test_details_do_not_ask_again_what_is_known(ask: Ask) -> None:
    """What is told beside an answer is no part of the question: the engine folds both calls."""
    model = ask(lambda message: "a")
    model.spark.sql("SELECT llm('p', t), llm('p', t, failOnError => false) FROM VALUES ('x') AS v(t)").collect()
    assert len({request.key for request in model.requests()}) == 1


def test_options_of_python(ask: Ask) -> None:
    model = ask(lambda message: '{"a": 3}' if "JSON" in message else "true")
    df = model.spark.createDataFrame([("x",)], "t STRING")
    struct = StructType().add("a", IntegerType())
    found = df.select(
        llm("p", "t", returns=BooleanType()).alias("b"),
        llm("p", "t", returns=struct).alias("s"),
        llm("p", "t", schema={"type": "object", "properties": {"a": {"type": "integer"}}})["a"].alias("i"),
        try_llm("p", "t", choices=["true", "false"]).alias("c"),
        llm("p", "t", failOnError=False, choices=F.array(F.lit("true"))).alias("e"),
    )
    assert found.dtypes == [
        ("b", "boolean"),
        ("s", "struct<a:int>"),
        ("i", "bigint"),
        ("c", "string"),
        ("e", "struct<result:string,errorMessage:string>"),
    ]
    assert found.first() == Row(b=True, s=Row(a=3), i=3, c="true", e=Row(result="true", errorMessage=None))


def test_max_tokens_is_what_the_type_needs(echo: SparkSession) -> None:
    def limit(options: str) -> int | None:
        [row] = echo.sql(f"SELECT llm('p', f => 'x'{options}) AS a").collect()
        found: int | None = json.loads(json.loads(row.a)[0]).get("max_tokens")
        return found

    assert limit("") is None
    assert limit(", choices => array('yes', 'no')") == 4
    assert limit(", choices => array('yes', 'no'), max_tokens => 9") == 9
