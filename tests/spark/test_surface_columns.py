"""``spark_llm.functions.llm``: the same call as in SQL, with its options checked where they are written."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

from spark_llm.call import CallSpec
from spark_llm.errors import LlmError
from spark_llm.functions import llm

pytestmark = pytest.mark.spark


def reached(spark: SparkSession, column: Column) -> tuple[CallSpec, list[Any]]:
    """What the call in ``column`` hands to the UDF for the row a='x', b=1, s={c: 2}."""
    df = spark.sql("SELECT 'x' AS a, 1 AS b, named_struct('c', 2) AS s")
    [row] = df.select(column).collect()
    spec, *values = json.loads(row[0])
    return msgspec.structs.replace(
        CallSpec.decode(spec), prompt=None, rows=None
    ), values  # as written, before the rules


def test_fields_keep_names_and_aliases(echo: SparkSession) -> None:
    call = llm(
        "p", "a", F.col("b").alias("n"), F.upper("a"), F.upper("a").alias("loud"), "s.c", x=F.col("b") + 1, y="a"
    )
    spec, values = reached(echo, call)
    assert [field.name for field in spec.fields] == ["a", "n", "upper(a)", "loud", "c", "x", "y"]
    assert values == ["p", "x", "1", "X", "X", "2", "2", "x"]


def test_star(echo: SparkSession) -> None:
    spec, values = reached(echo, llm("p", "*", b2="b"))
    assert [field.name for field in spec.fields] == ["a", "b", "s", "b2"]
    assert values == ["p", "x", "1", '{"c":2}', "1"]


def test_options(echo: SparkSession) -> None:
    call = llm(
        "p",
        "a",
        model="m",
        system="s",
        max_tokens=8,
        temperature=0.5,
        top_p=1,
        top_k=0,
        seed=7,
        stop=["\n", "END"],
        order="AS_WRITTEN",
    )
    spec, values = reached(echo, call)
    assert values == ["p", "x"]
    assert spec == CallSpec(
        fields=spec.fields,
        model="m",
        system="s",
        max_tokens=8,
        temperature=0.5,
        top_p=1.0,
        top_k=0,
        seed=7,
        stop=("\n", "END"),
        order="as_written",
    )
    spec, _ = reached(echo, llm("p", stop="x", max_tokens=F.lit(2) + F.lit(1)))
    assert (spec.stop, spec.max_tokens) == (("x",), 3)


def test_the_prompt_may_be_a_column(echo: SparkSession) -> None:
    assert reached(echo, llm(F.concat(F.lit("about "), "a")))[1] == ["about x"]
    with pytest.raises(AnalysisException, match="LLM_PROMPT_NOT_STRING"):
        reached(echo, llm(F.col("b")))
    with pytest.raises(LlmError, match="LLM_PROMPT_NOT_STRING"):
        llm(3)  # type: ignore[arg-type]


def test_a_table_with_columns_called_like_options(echo: SparkSession) -> None:
    df = echo.sql("SELECT 'gpt' AS model, 1 AS order")
    for fields in (["model", "order"], ["*"], [F.col("model"), F.col("order")]):
        spec, *values = json.loads(df.select(llm("p", *fields)).first()[0])  # type: ignore[index]
        assert [field.name for field in CallSpec.decode(spec).fields] == ["model", "order"]
        assert values == ["p", "gpt", "1"]


@pytest.mark.parametrize(
    ("options", "condition"),
    [
        ({"max_tokens": 0}, "LLM_INVALID_OPTION"),
        ({"temperature": "hot"}, "LLM_INVALID_OPTION"),
        ({"stop": []}, "LLM_INVALID_OPTION"),
        ({"order": "sorted"}, "LLM_INVALID_OPTION"),
        ({"choices": "a"}, "LLM_INVALID_OPTION.*ARRAY<STRING>"),
        ({"failOnError": "no"}, "LLM_INVALID_OPTION.*true or false"),
        ({"max_token": 5}, r"LLM_UNKNOWN_OPTION.*Did you mean max_tokens\?"),
        ({"modle": "m"}, r"LLM_UNKNOWN_OPTION.*Did you mean model\?"),
        ({"colour": 3}, "LLM_UNKNOWN_OPTION.*a field"),
    ],
)
def test_wrong_options_fail_at_once(echo: SparkSession, options: dict[str, Any], condition: str) -> None:
    with pytest.raises(LlmError, match=condition):
        llm("p", "a", **options)


def test_what_only_the_analyser_knows(echo: SparkSession) -> None:
    with pytest.raises(AnalysisException, match="LLM_OPTION_NOT_CONSTANT"):
        reached(echo, llm("p", max_tokens=F.col("b")))
    with pytest.raises(AnalysisException, match="UNRESOLVED_COLUMN"):
        reached(echo, llm("p", "nowhere"))
