"""Wrong calls: an ordinary AnalysisException with our condition, SQLSTATE and a way out, before anything runs."""

from __future__ import annotations

import pytest
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark


def failure(spark: SparkSession, query: str) -> AnalysisException:
    with pytest.raises(AnalysisException) as error:
        spark.sql(query)
    assert "py4j" not in str(error.value).partition("JVM stacktrace")[0]
    assert str(error.value).startswith(f"[{error.value.getCondition()}] ")
    return error.value


@pytest.mark.parametrize(
    ("arguments", "condition", "state", "says"),
    [
        ("", "LLM_PROMPT_MISSING", "22023", "llm('Is this review positive?', review)"),
        ("body => text", "LLM_PROMPT_MISSING", "22023", "first argument"),
        ("max_tokens => 3", "LLM_PROMPT_MISSING", "22023", "first argument"),
        ("id, text", "LLM_PROMPT_NOT_STRING", "22023", "is BIGINT"),
        ("array('p'), text", "LLM_PROMPT_NOT_STRING", "22023", "ARRAY<STRING>"),
        ("'p', CAST(text AS BINARY)", "LLM_UNSUPPORTED_FIELD_TYPE", "22023", "Field text of llm() has type BINARY"),
        ("'p', text, max_tokens => id", "LLM_OPTION_NOT_CONSTANT", "22023", "Option max_tokens"),
        ("'p', system => upper(text)", "LLM_OPTION_NOT_CONSTANT", "22023", "upper"),
        ("'p', max_tokens => (SELECT 1)", "LLM_OPTION_NOT_CONSTANT", "22023", "scalarsubquery"),
        ("'p', seed => rand()", "LLM_OPTION_NOT_CONSTANT", "22023", "rand()"),
        ("'p', max_tokens => 0", "LLM_INVALID_OPTION", "22023", "0 is not a valid value of option max_tokens"),
        ("'p', max_tokens => 2.5", "LLM_INVALID_OPTION", "22023", "a whole number of at least 1"),
        ("'p', max_tokens => '8'", "LLM_INVALID_OPTION", "22023", "'8'"),
        ("'p', max_tokens => true", "LLM_INVALID_OPTION", "22023", "True"),
        ("'p', temperature => -0.1", "LLM_INVALID_OPTION", "22023", "at least 0"),
        ("'p', temperature => CAST('NaN' AS DOUBLE)", "LLM_INVALID_OPTION", "22023", "nan"),
        ("'p', temperature => 'hot'", "LLM_INVALID_OPTION", "22023", "'hot'"),
        ("'p', top_p => 0.0", "LLM_INVALID_OPTION", "22023", "above 0 and at most 1"),
        ("'p', top_p => 1.01", "LLM_INVALID_OPTION", "22023", "above 0 and at most 1"),
        ("'p', top_k => -1", "LLM_INVALID_OPTION", "22023", "at least 0"),
        ("'p', seed => 1.5", "LLM_INVALID_OPTION", "22023", "a whole number"),
        ("'p', model => 3", "LLM_INVALID_OPTION", "22023", "a STRING"),
        ("'p', model => ''", "LLM_INVALID_OPTION", "22023", "not empty"),
        ("'p', stop => array('a', '')", "LLM_INVALID_OPTION", "22023", "none of them empty"),
        ("'p', stop => array()", "LLM_INVALID_OPTION", "22023", "ARRAY<STRING>"),
        ("'p', stop => array(1)", "LLM_INVALID_OPTION", "22023", "ARRAY<STRING>"),
        ("'p', seed => 1, seed => 2", "LLM_INVALID_OPTION", "22023", "only once"),
        ("'p', returns => 'BINARY'", "LLM_INVALID_RETURN_TYPE", "22023", "BINARY is no type that an answer can have"),
        ("'p', returns => text", "LLM_OPTION_NOT_CONSTANT", "22023", "Option returns"),
        ("'p', choices => array('a', 'a')", "LLM_INVALID_OPTION", "22023", "different texts"),
        ("'p', choices => id", "LLM_OPTION_NOT_CONSTANT", "22023", "Option choices"),
        ("'p', schema => 'a INT'", "LLM_INVALID_SCHEMA", "22023", "it is no JSON"),
        ("'p', regex => 'x(a|b'", "LLM_INVALID_CONSTRAINT", "22023", "unclosed group at character 2, before '(a|b'"),
        ("'p', regex => '(?=a)b'", "LLM_INVALID_CONSTRAINT", "22023", "look-ahead"),
        (
            """'p', schema => '{"properties": {"a": {"type": "array", "uniqueItems": true}}}'""",
            "LLM_INVALID_CONSTRAINT",
            "22023",
            'Unimplemented keys: ["uniqueItems"] (at /properties/a)',
        ),
        ("'p', schema => '{\"type\": \"strin\"}'", "LLM_INVALID_CONSTRAINT", "22023", "Invalid type: strin"),
        ("'p', returns => 'INT', regex => '[0-9]'", "LLM_CONFLICTING_OPTIONS", "22023", "returns and regex"),
        ("'p', order => text", "LLM_OPTION_NOT_CONSTANT", "22023", "Option order"),
        ("'p', order => 'sorted'", "LLM_INVALID_OPTION", "22023", "'auto' or 'as_written'"),
        ("'p', order => 1", "LLM_INVALID_OPTION", "22023", "'auto' or 'as_written'"),
        ("'p', truncate => true", "LLM_INVALID_OPTION", "22023", "'longest'"),
        ("'p', failOnError => 1", "LLM_INVALID_OPTION", "22023", "true or false"),
        ("'p', fail_on_error => false", "LLM_UNKNOWN_OPTION", "22023", "Did you mean failOnError?"),
        ("'p', text, max_token => 5", "LLM_UNKNOWN_OPTION", "22023", "Did you mean max_tokens?"),
        ("'p', text, maxTokens => 5", "LLM_UNKNOWN_OPTION", "22023", "Did you mean max_tokens?"),
        ("'p', text, max_new_tokens => 5", "LLM_UNKNOWN_OPTION", "22023", "Did you mean max_tokens?"),
        ("'p', text, temprature => 0.5", "LLM_UNKNOWN_OPTION", "22023", "Did you mean temperature?"),
        ("'p', text, modle => 'm'", "LLM_UNKNOWN_OPTION", "22023", "Did you mean model?"),
    ],
)
def test_wrong_calls(echo: SparkSession, arguments: str, condition: str, state: str, says: str) -> None:
    error = failure(echo, f"SELECT llm({arguments}) FROM (SELECT id, string(id) AS text FROM range(2))")
    assert (error.getCondition(), error.getSqlState()) == (condition, state)
    assert says in str(error)
    assert f"SQLSTATE: {state}" in str(error)


def test_the_message_is_spark_s_everywhere(echo: SparkSession) -> None:
    error = failure(echo, "SELECT llm('p', max_tokens => 0)")
    assert error.getMessageParameters()["option"] == "max_tokens"
    assert error.getMessage().startswith("[LLM_INVALID_OPTION] 0 is not a valid value")
    assert "line 1 pos 7" in str(error)


def test_a_field_may_be_called_nearly_like_an_option(echo: SparkSession) -> None:
    """Only a constant is taken for a slip of the pen: columns are fields."""
    assert echo.sql("SELECT llm('p', mode => upper(text)) FROM VALUES ('x') AS t(text)").count() == 1
    assert echo.sql("SELECT llm('p', colour => 'red')").count() == 1


def test_the_jvm_s_own_errors_stay_what_they_are(echo: SparkSession) -> None:
    with pytest.raises(Exception, match="DIVIDE_BY_ZERO"):
        echo.sql("SELECT llm('p', max_tokens => CAST(1 / 0 AS INT))")


def test_wrong_settings_fail_when_the_query_is_analysed(echo: SparkSession) -> None:
    echo.sql("SET spark.llm.engine.dtyp = float32")
    error = failure(echo, "SELECT llm('p')")
    assert error.getCondition() == "LLM_UNKNOWN_CONFIG"
    assert "Did you mean spark.llm.engine.dtype?" in str(error)
    echo.sql("RESET spark.llm.engine.dtyp")
    echo.sql("SET spark.llm.windowRows = many")
    assert failure(echo, "SELECT llm('p')").getCondition() == "LLM_INVALID_CONFIG"
    assert echo.sql("SELECT 1").count() == 1
