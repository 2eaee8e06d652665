"""What reaches the UDF from SQL: names, rendered values, options; and where llm() may stand in a query."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pyspark.sql import DataFrame, SparkSession

from spark_llm.call import CallSpec

pytestmark = pytest.mark.spark


def calls(df: DataFrame) -> list[tuple[CallSpec, list[str | None]]]:
    """The echoed arguments of each row's only column: (spec as written, before the rules, [prompt, field, ...])."""
    rows = [json.loads(row[0]) for row in df.collect()]
    return [(msgspec.structs.replace(CallSpec.decode(row[0]), prompt=None, rows=None), row[1:]) for row in rows]


def spec_of(df: DataFrame) -> CallSpec:
    """The CallSpec in the plan of ``SELECT llm(...)``; runs nothing."""
    udf = df._jdf.queryExecution().analyzed().projectList().apply(0).child().child()  # of the call's name
    return CallSpec.decode(udf.children().apply(0).value().toString())


def call(spark: SparkSession, arguments: str, source: str = "VALUES (1, 'x') AS t(id, text)") -> dict[str, Any]:
    """The fields of the only row of ``SELECT llm('p', <arguments>) FROM <source>``: name -> value; JSON is parsed."""
    [(spec, [prompt, *values])] = calls(spark.sql(f"SELECT llm('p', {arguments}) FROM {source}"))
    assert prompt == "p"
    assert len(values) == len(spec.fields)
    return {
        field.name: json.loads(value) if field.json and value is not None else value
        for field, value in zip(spec.fields, values, strict=True)
    }


def test_positional_fields_take_their_columns_names(echo: SparkSession) -> None:
    assert call(echo, "id, t.text") == {"id": 1, "text": "x"}


def test_named_fields(echo: SparkSession) -> None:
    assert call(echo, "text, body => upper(text), n => id + 1") == {"text": "x", "body": "X", "n": 2}


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        ("upper(text)", "upper(text)"),
        ("id + 1", "(id + 1)"),
        ("CAST(id AS STRING)", "id"),
        ("s.inner", "inner"),
        ("s.deep.leaf", "leaf"),
        ("l.inner", "inner"),
        ("m['k']", "m[k]"),
        ("'constant'", "constant"),
    ],
)
def test_expressions_take_the_name_of_a_select_list(echo: SparkSession, expression: str, name: str) -> None:
    source = (
        "(SELECT 1 AS id, 'x' AS text, named_struct('inner', 'i', 'deep', named_struct('leaf', 2)) AS s,"
        " array(named_struct('inner', 3)) AS l, map('k', 'v') AS m)"
    )
    assert [field.name for field in spec_of(echo.sql(f"SELECT llm('p', {expression}) FROM {source}")).fields] == [name]
    assert echo.sql(f"SELECT {expression} FROM {source}").columns == [name]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("llm('Is it good?', text)", "llm(Is it good?, text)"),
        ("llm('p', text, returns => 'INT')", "llm(p, text, returns => INT)"),
        ("llm('p', *, n => id + 1)", "llm(p, id, text, n => (id + 1))"),
        ("LLM('p', text, returns => 'STRUCT<a: INT>').a", "llm(p, text, returns => STRUCT<a: INT>).a"),
        ("ai_classify(text, array('good', 'bad'))", "ai_classify(text, array(good, bad))"),
        ("ai_extract(text, array('who')).who", "ai_extract(text, array(who)).who"),
        ("ai_summarize(text, max_words => 9)", "ai_summarize(text, max_words => 9)"),
        (
            "ai_query('default', text, failOnError => false).result",
            "ai_query(default, text, failOnError => false).result",
        ),
        ("upper(ai_gen(text))", "upper(ai_gen(text))"),
        ("llm('q', llm('p', text))", "llm(q, llm(p, text))"),
        ("ai_filter('good?', text) AND id = 1", "(ai_filter(good?, text) AND (id = 1))"),
    ],
)
def test_a_column_without_a_name_is_called_as_the_call_is_written(echo: SparkSession, call: str, name: str) -> None:
    assert echo.sql(f"SELECT {call} FROM VALUES (1, 'x') AS t(id, text)").columns == [name]


def test_calls_are_the_same_whatever_they_are_called(echo: SparkSession) -> None:
    """Where a query means a call again: in GROUP BY, HAVING and ORDER BY, and in a cached table's plan."""
    echo.sql("SELECT 'x' AS text, 1 AS id").createOrReplaceTempView("t")
    call = "ai_classify(text, array('a', 'b'))"
    for rest in ("ALL", "1 ORDER BY 1", f"{call} HAVING {call} = 'a' ORDER BY {call}"):
        df = echo.sql(f"SELECT {call}, count(*) AS n FROM t GROUP BY {rest}")
        assert df.columns == ["ai_classify(text, array(a, b))", "n"]
    inner = echo.sql(f"SELECT id, {call} FROM t")
    assert inner.where("`ai_classify(text, array(a, b))` = 'a'").columns == inner.columns
    written_otherwise = echo.sql("SELECT id, ai_classify(labels => array('a', 'b'), content => text) FROM t")
    assert written_otherwise.columns[1] == "ai_classify(labels => array(a, b), content => text)"
    assert written_otherwise.sameSemantics(inner)


def test_star_and_except(echo: SparkSession) -> None:
    source = "VALUES (1, 'x', true) AS t(id, text, ok)"
    assert call(echo, "*", source) == {"id": 1, "text": "x", "ok": True}
    assert call(echo, "t.*", source) == {"id": 1, "text": "x", "ok": True}
    assert call(echo, "* EXCEPT (id)", source) == {"text": "x", "ok": True}
    assert call(echo, "*, max_tokens => 2, n => 5", source) == {"id": 1, "text": "x", "ok": True, "n": 5}


def test_equal_names_stay_apart(echo: SparkSession) -> None:
    [(spec, values)] = calls(
        echo.sql("SELECT llm('p', *) FROM VALUES (1, 'l') a(id, t) JOIN VALUES (1, 'r') b(id, t) ON a.id = b.id")
    )
    assert [field.name for field in spec.fields] == ["id", "t", "id", "t"]
    assert values == ["p", "1", "l", "1", "r"]


def test_columns_called_like_options(echo: SparkSession) -> None:
    source = "VALUES ('gpt', 'asc', 3) AS t(model, order, max_tokens)"
    assert call(echo, "*", source) == {"model": "gpt", "order": "asc", "max_tokens": 3}
    assert call(echo, "model, t.order", source) == {"model": "gpt", "order": "asc"}
    [(spec, _)] = calls(echo.sql(f"SELECT llm('p', model, model => 'other') FROM {source}"))
    assert spec.model == "other"
    assert [field.name for field in spec.fields] == ["model"]


JSON_VALUES = [
    ("1Y", "1"),
    ("-7", "-7"),
    ("9000000000000", "9000000000000"),
    ("1.50BD", "1.50"),
    ("CAST(0 AS DECIMAL(38,18))", "0.000000000000000000"),
    ("0.1D", "0.1"),
    ("CAST(0.1 AS FLOAT)", "0.1"),
    ("1e30D", "1.0E30"),
    ("CAST('NaN' AS DOUBLE)", '"NaN"'),
    ("CAST('-Infinity' AS DOUBLE)", '"-Infinity"'),
    ("true", "true"),
    ("DATE'2024-02-29'", '"2024-02-29"'),
    ("TIMESTAMP'2024-02-29 10:00:00'", '"2024-02-29T10:00:00.000Z"'),
    ("TIMESTAMP_NTZ'2024-02-29 10:00:00'", '"2024-02-29T10:00:00.000"'),
    ("INTERVAL '1' DAY", "\"INTERVAL '1' DAY\""),
    ("named_struct('a', 1, 'b', CAST(NULL AS STRING), 'c', 'q\"')", r'{"a":1,"b":null,"c":"q\""}'),
    ("array(1, NULL, 3)", "[1,null,3]"),
    ("array('[x]', ']')", '["[x]","]"]'),
    ("map('k', 1.5D)", '{"k":1.5}'),
    ("parse_json('{\"a\": [1, null]}')", '{"a":[1,null]}'),
    ("array(DATE'2024-01-01')", '["2024-01-01"]'),
]


@pytest.mark.parametrize("is_folded", [True, False])
def test_values_are_rendered_as_json(echo: SparkSession, is_folded: bool) -> None:
    """Folded by the optimizer, and computed row by row from columns."""
    if is_folded:
        query = f"SELECT llm('p', {', '.join(expression for expression, _ in JSON_VALUES)})"
    else:
        columns = ", ".join(f"{expression} AS v{i}" for i, (expression, _) in enumerate(JSON_VALUES))
        query = f"SELECT llm('p', *) FROM (SELECT /*+ REPARTITION(1) */ {columns} FROM range(1))"
    [(spec, values)] = calls(echo.sql(query))
    assert all(field.json for field in spec.fields)
    assert values == ["p", *(text for _, text in JSON_VALUES)]
    for _, text in JSON_VALUES:
        json.loads(text)


def test_strings_stay_plain(echo: SparkSession) -> None:
    echo.sql("CREATE OR REPLACE TEMP VIEW s AS SELECT 'a\"b' AS s, CAST('ab' AS VARCHAR(3)) AS v")
    [(spec, values)] = calls(echo.sql("SELECT llm('p', s, v, c => s COLLATE UTF8_LCASE) FROM s"))
    assert [field.json for field in spec.fields] == [False, False, False]
    assert values == ["p", 'a"b', "ab", 'a"b']


def test_null_stays_null(echo: SparkSession) -> None:
    kinds = ["STRING", "INT", "DOUBLE", "DATE", "STRUCT<a: INT>", "ARRAY<INT>", "VARIANT"]
    nulls = ", ".join(f"CAST(NULL AS {kind}) AS v{i}" for i, kind in enumerate(kinds))
    found = call(echo, "*, untyped => NULL", f"(SELECT /*+ REPARTITION(1) */ {nulls} FROM range(1))")
    assert found == {**{f"v{i}": None for i in range(len(kinds))}, "untyped": None}


def test_null_prompt(echo: SparkSession) -> None:
    for prompt in ("NULL", "CAST(NULL AS STRING)"):
        [(_, values)] = calls(echo.sql(f"SELECT llm({prompt}, 'x')"))
        assert values == [None, "x"]


def test_a_prompt_alone_and_a_prompt_from_a_column(echo: SparkSession) -> None:
    assert calls(echo.sql("SELECT llm('p')")) == [(CallSpec(), ["p"])]
    rows = calls(echo.sql("SELECT llm(q, id) FROM VALUES ('a', 1), ('b', 2) AS t(q, id)"))
    assert sorted(values for _, values in rows) == [["a", "1"], ["b", "2"]]


def test_options_reach_the_spec(echo: SparkSession) -> None:
    spec = spec_of(
        echo.sql(
            "SELECT llm('p', id, model => 'm', system => 's', max_tokens => 8, temperature => 0.7, top_p => 0.9D,"
            " top_k => 40, seed => -3, stop => array('\\n', 'END'), order => 'as_written') FROM range(1)"
        )
    )
    assert spec == CallSpec(
        fields=spec.fields,
        model="m",
        system="s",
        max_tokens=8,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        seed=-3,
        stop=("\n", "END"),
        order="as_written",
    )
    assert [field.name for field in spec.fields] == ["id"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("max_tokens => 2 + 3", CallSpec(max_tokens=5)),
        ("MAX_TOKENS => 5", CallSpec(max_tokens=5)),
        ("max_tokens => CAST('5' AS INT)", CallSpec(max_tokens=5)),
        ("temperature => 1", CallSpec(temperature=1.0)),
        ("stop => 'a'", CallSpec(stop=("a",))),
        ("ORDER => 'Auto'", CallSpec(order="auto")),
        ("system => nvl(NULL, 'you')", CallSpec(system="you")),
        ("system => concat('a', upper('b'))", CallSpec(system="aB")),
        ("max_tokens => year(current_date()) - year(now()) + 1", CallSpec(max_tokens=1)),
        ("model => NULL", CallSpec()),
        ("system => CAST(NULL AS STRING)", CallSpec()),
    ],
)
def test_constant_expressions_are_options(echo: SparkSession, option: str, expected: CallSpec) -> None:
    assert spec_of(echo.sql(f"SELECT llm('p', {option})")) == expected


def test_variables_and_parameters_are_constants(echo: SparkSession) -> None:
    echo.sql("DECLARE OR REPLACE VARIABLE tokens INT = 7")
    assert calls(echo.sql("SELECT llm('p', max_tokens => tokens)")) == [(CallSpec(max_tokens=7), ["p"])]
    df = echo.sql("SELECT llm(:prompt, max_tokens => :n)", {"prompt": "q", "n": 3})
    assert calls(df) == [(CallSpec(max_tokens=3), ["q"])]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT a FROM (SELECT llm('p', text) AS a FROM t)",
        "WITH c AS (SELECT llm('p', text) AS a FROM t) SELECT a FROM c",
        "SELECT llm('p', text) AS a FROM t ORDER BY id",
        "SELECT (SELECT max(llm('p', text)) FROM t) AS a",
        "SELECT max(llm('p', text)) AS a FROM t",
        "SELECT llm('p', text => max(text)) AS a FROM t GROUP BY id",
        "SELECT llm('p', text) AS a FROM t WHERE llm('q', text) LIKE '%text%'",
        "SELECT llm('p', text) AS a FROM t GROUP BY llm('p', text)",
        "SELECT u.a FROM (SELECT id, llm('p', text) AS a FROM t) u JOIN t ON u.id = t.id",
        "SELECT CASE WHEN id = 1 THEN llm('p', text) END AS a FROM t",
        "SELECT llm('p', text) AS a FROM t UNION SELECT llm('p', text) FROM t",
        "SELECT a FROM (SELECT upper(lower(text)) AS text_, llm('p', text => lower(text_)) AS a FROM t)",
        "SELECT a FROM t LATERAL VIEW explode(array(llm('p', text))) v AS a",
    ],
)
def test_a_call_may_stand_anywhere(echo: SparkSession, query: str) -> None:
    echo.sql("CREATE OR REPLACE TEMP VIEW t AS SELECT 1 AS id, 'x' AS text")
    [(spec, values)] = calls(echo.sql(query))
    assert [field.name for field in spec.fields] == ["text"]
    assert values == ["p", "x"]


@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_adaptive_execution(echo: SparkSession, adaptive: str) -> None:
    echo.conf.set("spark.sql.adaptive.enabled", adaptive)
    query = (
        "SELECT llm('p', n => count(*), k) AS a FROM (SELECT id % 3 AS k FROM range(30)) JOIN range(3) r ON k = r.id"
        " WHERE llm('q', k) LIKE '%q%' GROUP BY k"
    )
    assert sorted(values for _, values in calls(echo.sql(query))) == [["p", "10", str(k)] for k in range(3)]


def test_nested_calls(echo: SparkSession) -> None:
    [(spec, [prompt, inner])] = calls(echo.sql("SELECT llm('outer', answer => llm('inner', 'x'))"))
    assert (prompt, [field.name for field in spec.fields]) == ("outer", ["answer"])
    assert json.loads(inner or "")[1:] == ["inner", "x"]


def test_temporary_view_and_sql_function(echo: SparkSession) -> None:
    echo.sql("CREATE OR REPLACE TEMP VIEW t AS SELECT 'x' AS text")
    echo.sql("CREATE OR REPLACE TEMP VIEW answers AS SELECT llm('p', text) AS a FROM t")
    assert [values for _, values in calls(echo.table("answers"))] == [["p", "x"]]
    echo.sql("CREATE OR REPLACE TEMP FUNCTION ask(text STRING) RETURNS STRING RETURN llm('p', text)")
    assert [values for _, values in calls(echo.sql("SELECT ask(text) FROM t"))] == [["p", "x"]]


def test_without_a_seed_sampling_is_not_deterministic(echo: SparkSession) -> None:
    def deterministic(options: str) -> bool:
        plan = echo.sql(f"SELECT llm('p', id, {options}) FROM range(2)")._jdf.queryExecution().analyzed()
        return bool(plan.projectList().apply(0).deterministic())

    assert deterministic("temperature => 0.0")
    assert deterministic("temperature => 0.7, seed => 1")
    assert not deterministic("temperature => 0.7")


def test_described_like_a_built_in_function(echo: SparkSession) -> None:
    text = "\n".join(row[0] for row in echo.sql("DESCRIBE FUNCTION EXTENDED llm").collect())
    assert "llm(prompt, field, ..., option => constant)" in text
    assert "max_tokens" in text
