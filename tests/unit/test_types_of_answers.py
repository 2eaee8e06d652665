"""Answer types: DDL with ENUM, JSON Schemas, and constraints all of whose matches a Spark type can hold."""

from __future__ import annotations

import datetime
import decimal
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.call import AnswerForm
from spark_llm.errors import LlmError
from spark_llm.functions import patterns
from spark_llm.functions.answer import answer_of
from spark_llm.functions.python_types import plain_options
from spark_llm.functions.schemas import read_schema, schema_of, words
from spark_llm.functions.types import AnswerType, parse_type

sys.path.append(str(Path(__file__).parents[1] / "spark"))
from drawn_answers import accepts, drawn, types, written

INTEGERS = {"TINYINT": 7, "SMALLINT": 15, "INT": 31, "BIGINT": 63}
SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)


def spark_has(answer: AnswerType, value: Any, nullable: bool = False) -> bool:
    """Does Spark have this JSON value as that type, with all that it says?"""
    if value is None:
        return nullable
    if answer.name == "STRUCT":
        return list(value) == [field.name for field in answer.fields] and all(
            spark_has(field.type, value[field.name], field.nullable) for field in answer.fields
        )
    if answer.element is not None:
        parts = value if answer.name == "ARRAY" else value.values()
        return isinstance(value, list if answer.name == "ARRAY" else dict) and all(
            spark_has(answer.element, part) for part in parts
        )
    if answer.name in INTEGERS:
        bits = INTEGERS[answer.name]
        return isinstance(value, int) and -(2**bits) <= value < 2**bits
    if answer.name == "DECIMAL":
        precision, scale = answer.digits
        number = decimal.Decimal(str(value))
        return abs(number) < 10 ** (precision - scale) and -number.as_tuple().exponent <= scale
    if answer.name == "BOOLEAN":
        return isinstance(value, bool)
    if answer.name in ("FLOAT", "DOUBLE"):
        most = 3.4028234663852886e38 if answer.name == "FLOAT" else sys.float_info.max
        return isinstance(value, int | float | decimal.Decimal) and abs(value) <= most
    if answer.name == "ENUM":
        return value in answer.choices
    if answer.name == "DATE":
        return datetime.date.fromisoformat(value).isoformat() == value
    if answer.name.startswith("TIMESTAMP"):
        return datetime.datetime.fromisoformat(value).isoformat() == value
    return isinstance(value, str) and (answer.name != "VARCHAR" or len(value) <= answer.length)


@given(types())
@SETTINGS
def test_what_is_written_is_read(answer: AnswerType) -> None:
    assert parse_type(written(answer)) == answer
    words(answer)


@pytest.mark.parametrize(
    ("ddl", "reason"),
    [
        ("", "expected a type, found the end"),
        ("NUMBER", "NUMBER is no type"),
        ("BINARY", "BINARY is no type"),
        ("STRUCT<a INT", "expected > after field a, found the end"),
        ("STRUCT<a INT, A INT>", "two fields A"),
        ("STRUCT<>", "expected the name of a field"),
        ("ARRAY<INT>>", "goes on with >"),
        ("MAP<INT, INT>", "keys of a MAP are STRING"),
        ("DECIMAL(39)", "a number from 1 to 38"),
        ("DECIMAL(3, 4)", "a number from 0 to 3"),
        ("ENUM<'a', 'a'>", "a value twice"),
        ("ENUM<a>", "are texts"),
        ("ENUM<''>", "not empty"),
        ("STRUCT<a INT COMMENT b>", "a text after COMMENT"),
        ("INT; DROP", "nothing begins with ';"),
        ("ARRAY<" * 40 + "INT" + ">" * 40, "nested deeper than 32"),
    ],
)
def test_wrong_types_say_what_is_wrong(ddl: str, reason: str) -> None:
    with pytest.raises(LlmError, match="LLM_INVALID_RETURN_TYPE") as error:
        parse_type(ddl)
    assert reason in str(error.value)


def test_fields_alone_are_a_struct() -> None:
    assert parse_type("a INT, b: STRING NOT NULL") == parse_type("STRUCT<a: INT, b: STRING NOT NULL>")


@given(types(), st.integers(0, 2**32))
@SETTINGS
def test_whatever_the_constraint_lets_through_is_of_the_type(answer: AnswerType, seed: int) -> None:
    found = answer_of({"returns": written(answer)})
    form = found.form
    if form is None:
        assert answer.name == "STRING"
        return
    text = drawn(form, random.Random(seed))
    if text is None:
        return
    value = json.loads(text, parse_float=decimal.Decimal) if form.is_json else text
    assert spark_has(found.type if answer.name == "VARCHAR" else answer, value), (form, text)
    assert found.length is None or len(text.encode()) < found.length


@pytest.mark.parametrize(
    ("ddl", "yes", "no"),
    [
        ("TINYINT", ["-128", "0", "127"], ["128", "-129", "1.0", "01", "true"]),
        ("INT", ["-2147483648", "2147483647"], ["2147483648", "-2147483649", "1e3", ""]),
        ("BIGINT", ["-999999999999999999", "1000000000000000000"], ["9223372036854775808"]),
        ("DECIMAL(5,2)", ["999.99", "-0.5", "3"], ["1000", "0.123", ".5"]),
        ("DECIMAL(2,2)", ["0.99", "0"], ["1", "1.0"]),
        ("DOUBLE", ["3.25", "-0.001", "999999999999999"], ["NaN", "1e5", "00", "."]),
        ("BOOLEAN", ["true", "false"], ["yes", "TRUE"]),
        ("DATE", ["2024-02-29", "1999-12-31", "2000-02-29"], ["2023-02-29", "2024-13-01", "24-01-01", "1900-02-29"]),
        ("TIMESTAMP", ["2024-02-29T23:59:59"], ["2024-02-29 10:00:00", "2024-02-29T24:00:00"]),
        ("VARCHAR(3)", ["abc", "äöü", "a\nb"], ["abcd", ""]),
        ("ARRAY<DATE>", ['["2024-02-29"]', "[]"], ['["2023-02-29"]', "[null]"]),
        ("STRUCT<a: INT NOT NULL, b: STRING>", ['{"a":1,"b":null}'], ['{"a":null,"b":""}', '{"b":"","a":1}', "{}"]),
        ("STRUCT<d: DECIMAL(18,6) NOT NULL>", ['{"d":999999999.999999}'], ['{"d":1000000000000}', '{"d":0.1234567}']),
        ("MAP<STRING, BOOLEAN>", ['{"x":true}', "{}"], ['{"x":1}', "{x:true}"]),
    ],
)
def test_limits_of_types(ddl: str, yes: list[str], no: list[str]) -> None:
    form = answer_of({"returns": ddl}).form
    assert form is not None
    assert [text for text in yes if not accepts(form, text)] == []
    assert [text for text in no if accepts(form, text)] == []


NUMBERS = {
    **{name: (["0", "-1", f"{2**bits - 1}", f"-{2**bits}"], [f"{2**bits}", f"-{2**bits + 1}", "1.0", "1e1"])
       for name, bits in INTEGERS.items() if name != "BIGINT"},
    "BIGINT": ([f"{10**18}", f"-{10**18}"], [f"{2**63}", f"-{2**63 + 1}", "1e18"]),
    "FLOAT": (["999999999999999", "-999999999999999", "-0.000000000000001"], ["1e39", "1000000000000000"]),
    "DOUBLE": (["999999999999999", "-999999999999999", "-0.000000000000001"], ["1e999", "1" + "0" * 309]),
    "DECIMAL(38,0)": (["999999999999999", "-999999999999999"], ["1e38", "1" + "0" * 38, "0.1"]),
    "DECIMAL(38,38)": (["0.9999999999", "-0.9999999999", "0"], ["1", "-1", "0." + "1" * 39]),
    "DECIMAL(20,5)": (["9999999999.99999", "-9999999999.99999"], ["1" + "0" * 15, "0.000001"]),
    "DECIMAL(1,0)": (["9", "-9"], ["10", "-10", "0.5"]),
}  # fmt: skip


@pytest.mark.parametrize("ddl", NUMBERS)
def test_numbers_at_their_limits(ddl: str) -> None:
    """Bare, as a field, as an element, by DDL: at the limit, and not beyond."""
    yes, no = NUMBERS[ddl]
    shapes = {
        ddl: "{}",
        f"ARRAY<{ddl}>": "[{}]",
        f"STRUCT<a: {ddl}>": '{{"a":{}}}',
        f"MAP<STRING, {ddl}>": '{{"k":{}}}',
    }
    for type_of, shape in shapes.items():
        form = answer_of({"returns": type_of}).form
        assert form is not None
        assert [text for text in yes if not accepts(form, shape.format(text))] == [], type_of
        assert [text for text in no if accepts(form, shape.format(text))] == [], type_of


def numerals() -> st.SearchStrategy[str]:
    """JSON numbers of any length, with exponents of any size."""
    digits = st.text("0123456789", min_size=1, max_size=320).map(lambda text: text.lstrip("0") or "0")
    fraction = st.text("0123456789", max_size=40).map(lambda text: f".{text}" if text else "")
    exponent = st.one_of(st.just(""), st.integers(-999, 999).map("e{}".format), st.just("E+0400"))
    return st.builds("{}{}{}{}".format, st.sampled_from(["", "-"]), digits, fraction, exponent)


@given(st.sampled_from([*NUMBERS, "number", "integer"]), numerals(), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_every_number_that_is_let_through_is_one_of_its_type(kind: str, text: str, nullable: bool) -> None:
    if kind in ("number", "integer"):
        part = {"type": [kind, "null"] if nullable else kind}
        options = {"schema": json.dumps({"type": "object", "properties": {"a": part}, "required": ["a"]})}
    else:
        options = {"returns": f"STRUCT<a: {kind}{'' if nullable else ' NOT NULL'}>"}
    found = answer_of(options)
    assert found.form is not None
    if accepts(found.form, f'{{"a":{text}}}'):
        assert spark_has(found.type.fields[0].type, json.loads(text, parse_float=decimal.Decimal)), text
    assert accepts(found.form, '{"a":0}')
    assert accepts(found.form, '{"a":null}') == nullable


def test_days_are_those_of_the_calendar() -> None:
    day = re.compile(patterns.DATE)
    for year in (1000, 1900, 1999, 2000, 2023, 2024, 9996, 9999):
        for month in range(14):
            for number in range(33):
                text = f"{year:04}-{month:02}-{number:02}"
                try:
                    exists = bool(datetime.date(year, month, number))
                except ValueError:
                    exists = False
                assert bool(day.fullmatch(text)) == exists, text


def test_schemas_of_users() -> None:
    schema = {
        "$defs": {
            "Line": {"type": "object", "title": "L", "properties": {"sku": {"type": "string"}}, "required": ["sku"]}
        },
        "type": "object",
        "properties": {
            "id": {"type": "integer", "description": "the number"},
            "day": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
            "mood": {"enum": ["good", "bad"]},
            "title": {"type": "string", "maxLength": 5},
            "lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}},
            "tags": {"type": "object", "additionalProperties": {"type": "number"}},
            "any": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        },
        "required": ["id", "day", "mood", "title", "lines", "tags", "any"],
    }
    answer, held = read_schema(json.dumps(schema))
    line = "STRUCT<`sku`: STRING>"
    fields = "`id`: BIGINT, `day`: DATE, `mood`: STRING, `title`: STRING"
    assert answer.ddl == f"STRUCT<{fields}, `lines`: ARRAY<{line}>, `tags`: MAP<STRING, DOUBLE>, `any`: STRING>"
    assert words(answer).startswith('{"id": integer (the number), "day": "YYYY-MM-DD" or null')
    form = AnswerForm(kind="json_schema", text=json.dumps(held))
    row = {"id": 1, "day": "2024-02-29", "mood": "good", "title": "abcde", "lines": [{"sku": ""}], "tags": {}, "any": 3}
    assert accepts(form, json.dumps(row))
    for wrong in ({"day": "2023-02-29"}, {"id": 2**63}, {"title": "abcdef"}, {"lines": [{}]}, {"more": 1}):
        assert not accepts(form, json.dumps(row | wrong))


def test_a_list_of_types_is_bounded_as_the_one_that_it_stands_for() -> None:
    """Pydantic and others write ``["integer", "null"]``."""
    bounds = {"integer": (10**18, 10**19), "number": (999999999999999, 10**15)}
    for kind, (most, more) in bounds.items():
        answer, held = read_schema(json.dumps({"type": "array", "items": {"type": [kind, "null"]}}))
        assert answer.ddl == f"ARRAY<{'BIGINT' if kind == 'integer' else 'DOUBLE'}>"
        form = AnswerForm(kind="json_schema", text=json.dumps(held))
        assert accepts(form, f"[null,{most},-{most}]")
        assert not accepts(form, f"[{more}]")
    answer, held = read_schema('{"type": "array", "items": {"type": ["string", "null"], "format": "date"}}')
    form = AnswerForm(kind="json_schema", text=json.dumps(held))
    assert accepts(form, '["2024-02-29",null]')
    assert not accepts(form, '["2023-02-29"]')
    assert read_schema(json.dumps({"enum": [1, 2**70]}))[0].ddl == "STRING"


def test_a_schema_that_refers_to_itself_ends_in_text() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#"}}}
    answer, held = read_schema(json.dumps(node))
    assert answer.ddl == "STRUCT<`next`: STRING>"
    assert accepts(AnswerForm(kind="json_schema", text=json.dumps(held)), '{"next":{"next":{}}}')
    ways = {f"to{number}": {"$ref": "#/$defs/Node"} for number in range(9)}  # 9 ** 15 columns, were they followed
    tree = {"type": "object", "properties": {"name": {"type": "string"}} | ways}
    answer, _ = read_schema(json.dumps({"$defs": {"Node": tree}, "$ref": "#/$defs/Node"}))
    assert [field.type.name for field in answer.fields] == ["STRING"] * 10


def test_a_part_that_is_used_twice_is_read_twice() -> None:
    line = {"type": "object", "properties": {"n": {"type": "integer"}}}
    uses = {name: {"$ref": "#/$defs/line"} for name in "ab"}
    answer, _ = read_schema(json.dumps({"$defs": {"line": line}, "type": "object", "properties": uses}))
    assert answer.ddl == "STRUCT<`a`: STRUCT<`n`: BIGINT>, `b`: STRUCT<`n`: BIGINT>>"


def test_a_schema_of_far_more_values_than_its_text_is_refused() -> None:
    levels = {
        f"l{level}": {"type": "object", "properties": {name: {"$ref": f"#/$defs/l{level + 1}"} for name in "abcd"}}
        for level in range(12)
    } | {"l12": {"type": "string"}}
    with pytest.raises(LlmError, match="more than 10000 values"):
        read_schema(json.dumps({"$defs": levels, "$ref": "#/$defs/l0"}))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "it is no JSON"),
        ("[1]", "a JSON Schema is an object"),
        ('{"$ref": "http://x"}', "points outside"),
        ('{"$ref": "#/$defs/x"}', "points to nothing"),
        ('{"type": "object", "properties": {"a": {}, "A": {}}}', "case of letters"),
        ('{"type": "object", "properties": [1]}', "properties is [1], which is not an object"),
        ('{"items": {"enum": 5}}', "enum is 5, which is not an array"),
        ('{"type": "integer", "minimum": "1"}', 'minimum is "1", which is not a number'),
        ('{"type": "number", "maximum": 1e999}', "1e999 is no number"),
        ('{"enum": [NaN]}', "NaN is no number"),
        ('{"items": ' * 5000 + "{}" + "}" * 5000, "nested too deep"),
    ],
)
def test_wrong_schemas(schema: str, reason: str) -> None:
    with pytest.raises(LlmError, match="LLM_INVALID_SCHEMA") as error:
        read_schema(schema)
    assert reason in str(error.value)


def test_types_of_python() -> None:
    from pydantic import BaseModel
    from pydantic import Field as About
    from pyspark.sql.types import ArrayType, IntegerType, StringType, StructField, StructType

    class Item(BaseModel):
        name: str = About(description="as printed")
        count: int | None

    inner = StructType([StructField("b", IntegerType(), False, {"comment": "it's"})])
    struct = StructType([StructField("a", ArrayType(StringType())), StructField("s", inner)])
    text = plain_options({"returns": struct})["returns"]
    assert text == "STRUCT<`a`: ARRAY<string>, `s`: STRUCT<`b`: int NOT NULL COMMENT 'it\\'s'>>"
    assert parse_type(text).fields[1].type.fields[0].comment == "it's"
    options = plain_options({"returns": Item})
    assert options["returns"] is None
    assert options == plain_options({"returns": None, "schema": Item})
    assert read_schema(options["schema"])[0].ddl == "STRUCT<`name`: STRING, `count`: BIGINT>"
    assert plain_options({"schema": {"type": "object"}})["schema"] == '{"type": "object"}'


def test_what_options_say_together() -> None:
    several = answer_of({"returns": "ARRAY<STRING>", "choices": ("a", "b")})
    assert several.type.ddl == "ARRAY<STRING>"
    assert several.form is not None
    assert accepts(several.form, '["b"]')
    assert not accepts(several.form, '["c"]')
    assert answer_of({"returns": "STRING", "choices": ("a",)}) == answer_of({"choices": ("a",)})
    assert answer_of({"schema": '{"enum": ["a"]}'}) == answer_of({"choices": ("a",)})
    for options in ({"returns": "INT", "choices": ("1",)}, {"schema": "{}", "regex": "a"}):
        with pytest.raises(LlmError, match="LLM_CONFLICTING_OPTIONS"):
            answer_of(options)


@given(types())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_the_schema_of_a_type_is_of_that_type(answer: AnswerType) -> None:
    if answer.is_nested:
        read, held = read_schema(json.dumps(schema_of(answer)))
        assert read.is_nested
        assert json.loads(json.dumps(held)) == held
