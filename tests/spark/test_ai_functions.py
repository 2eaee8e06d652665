"""The AI functions: their types, what they ask, their arguments; SQL written for Databricks; named prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import fake_counting
import pytest
from fake_counting import FakeModel
from pyspark.errors import AnalysisException
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

import spark_llm
from spark_llm import functions as ai
from spark_llm.errors import LlmError
from spark_llm.functions.catalog import entries

pytestmark = pytest.mark.spark

DOCS = Path(__file__).parents[2] / "docs" / "ai-functions.md"


@pytest.fixture
def obedient(spark: SparkSession, tmp_path: Path) -> Iterator[FakeModel]:
    """A model that answers in the form that the prompt asks for."""

    def answer(message: str) -> str:
        if found := re.search(r"Answer with one of: ([^,.]+)", message):
            return found[1]
        if "Answer true or false." in message:
            return "true"
        if found := re.search(r"Answer in JSON: \{(.*)\}", message):
            names = re.findall(r'"([^"]+)": (text|number|integer|\[text|true)', found[1])
            values = {"text": f"about {len(message)}", "number": 1.5, "integer": 3, "[text": ["x"], "true": True}
            return json.dumps({name: values[kind] for name, kind in names})
        if "Answer with an integer." in message:
            return "7"
        if message == "Apache Spark":
            return "[1.0, 0.5]"
        return f"answer to {message.splitlines()[0]}"

    with fake_counting.fake_model(spark, tmp_path, reads_order=False, answers=answer) as found:
        yield found


CALLS = [
    ("ai_query('default', t)", lambda: ai.ai_query("default", "t"), "string"),
    (
        "ai_query('default', t, 'BOOLEAN', false)",
        lambda: ai.ai_query("default", "t", "BOOLEAN", False),
        "struct<result:boolean,errorMessage:string>",
    ),
    (
        "ai_query(request => t, modelParameters => named_struct('max_tokens', 5, 'top_p', .5D), endpoint => 'default')",
        lambda: ai.ai_query("default", "t", modelParameters={"max_tokens": 5, "top_p": 0.5}),
        "string",
    ),
    (
        "ai_query('default', t, responseFormat => 'STRUCT<result: STRUCT<a: STRING>>')",
        lambda: ai.ai_query("default", "t", responseFormat="STRUCT<result: STRUCT<a: STRING>>"),
        "string",
    ),
    ("ai_complete('default', t)", lambda: ai.ai_complete("default", "t"), "string"),
    ("ai_gen(t)", lambda: ai.ai_gen("t"), "string"),
    ("ai_classify(t, array('a', 'b'))", lambda: ai.ai_classify("t", ["a", "b"]), "string"),
    ("ai_classify(t, l)", lambda: ai.ai_classify("t", F.col("l")), "string"),
    (
        "ai_classify(t, array('a', 'b'), confidence => true)",
        lambda: ai.ai_classify("t", ["a", "b"], confidence=True),
        "struct<result:string,confidence:double>",
    ),
    (
        "ai_extract(t, array('who', 'it`s'))",
        lambda: ai.ai_extract("t", ["who", "it`s"]),
        "struct<who:string,it`s:string>",
    ),
    ("ai_summarize(t)", lambda: ai.ai_summarize("t"), "string"),
    ("ai_summarize(t, max_words => 9)", lambda: ai.ai_summarize("t", 9), "string"),
    ("ai_translate(t, 'es')", lambda: ai.ai_translate("t", "es"), "string"),
    ("ai_fix_grammar(t)", lambda: ai.ai_fix_grammar("t"), "string"),
    ("ai_mask(t, array('person', 'email'))", lambda: ai.ai_mask("t", ["person", "email"]), "string"),
    ("ai_analyze_sentiment(t)", lambda: ai.ai_analyze_sentiment("t"), "string"),
    ("ai_filter('Is it good?', t)", lambda: ai.ai_filter("Is it good?", "t"), "boolean"),
    ("try_llm('p', t, returns => 'INT')", lambda: ai.try_llm("p", "t", returns="INT"), "int"),
]


def test_types_and_the_same_calls_from_python(echo: SparkSession) -> None:
    table = echo.sql("SELECT 'x' AS t, array('a', 'b') AS l")
    table.createOrReplaceTempView("texts")
    for sql, column, kind in CALLS:
        by_sql = echo.sql(f"SELECT {sql} FROM texts")
        assert by_sql.schema[0].dataType.simpleString() == kind, sql
        assert table.select(column()).sameSemantics(by_sql), sql


def test_prompts(obedient: FakeModel) -> None:
    calls = {
        "ai_classify(t, array('b', 'a'))": "Which label fits the text?\nAnswer with one of: b, a.\ntext: x\n",
        "ai_summarize(t, 9)": "Summarize the text in at most 9 words.\ntext: x\n",
        "ai_summarize(t, 0)": "Summarize the text.\ntext: x\n",
        "ai_translate(t, 'es')": "Translate the text to Spanish. Answer with the translation only.\ntext: x\n",
        "ai_translate(t, 'Klingon')": "Translate the text to Klingon. Answer with the translation only.\ntext: x\n",
        "ai_gen('say ' || t)": "say x",
        "ai_query('default', t, returnType => 'INT')": "x\nAnswer with an integer.",
        "ai_query('default', named_struct('a', t, 'b', 2))": "Answer this request.\na: x\nb: 2\n",
        "ai_filter('Good?', t, stars => 3)": "Good?\nAnswer true or false.\nt: x\nstars: 3\n",
    }
    obedient.spark.sql("SET spark.llm.optimizer.mayChangePrompts = false")
    obedient.spark.sql(f"SELECT {', '.join(calls)} FROM (SELECT /*+ REPARTITION(1) */ 'x' AS t)").collect()
    assert sorted(request.prompt for request in obedient.requests()) == sorted(calls.values())


def test_null_texts_are_null_without_a_call(obedient: FakeModel) -> None:
    obedient.spark.sql("SELECT CAST(NULL AS STRING) AS t, array('a') AS l").createOrReplaceTempView("nothing")
    calls = ["ai_classify(t, array('a', 'b'))", "ai_classify(t, l)", "ai_extract(t, array('a'))", "ai_gen(t)"]
    [row] = obedient.spark.sql(f"SELECT {', '.join(calls)} FROM nothing").collect()
    assert list(row) == [None] * len(calls)
    assert obedient.requests() == []


@pytest.mark.parametrize(
    ("call", "condition", "says"),
    [
        (
            "ai_classify(t)",
            "LLM_INVALID_CALL",
            "argument labels is missing. Its signature is ai_classify(",
        ),
        ("ai_classify(t, array('a'), 'b')", "LLM_INVALID_CALL", "at most 2 arguments"),
        ("ai_classify(t, array('a', NULL))", "LLM_INVALID_CALL", "ARRAY<STRING> of different texts"),
        ("ai_extract(t, array(t))", "LLM_OPTION_NOT_CONSTANT", "labels"),
        ("ai_gen(prompt => t, prompt => t)", "LLM_INVALID_CALL", "prompt is given twice"),
        ("ai_summarize(t, -1)", "LLM_INVALID_CALL", "at least 0"),
        ("ai_query(t, t)", "LLM_OPTION_NOT_CONSTANT", "endpoint"),
        ("ai_query('default', t, files => t)", "LLM_INVALID_CALL", "no argument files"),
        ("ai_query('default', t, responseFormat => '{')", "LLM_INVALID_CALL", "responseFormat is no JSON"),
        (
            """ai_query('default', t,
                        responseFormat => '{"type": "json_schema", "json_schema": {"schema": {"not": {}}}}')""",
            "LLM_INVALID_CONSTRAINT",
            'Unimplemented keys: ["not"]',
        ),
        ("ai_query('default', t, modelParameters => named_struct('n', 2))", "LLM_INVALID_CALL", "known are max_tokens"),
        ("ai_query('default', t, 'INT', responseFormat => 'a INT')", "LLM_INVALID_CALL", "says what the answer is"),
        ("ai_extract(t, array('a'), returns => 'INT')", "LLM_INVALID_CALL", "it takes no returns"),
        ("ai_filter('q', t, choices => array('a'))", "LLM_INVALID_CALL", "it takes no choices"),
        ("ai_gen(t, max_token => 3)", "LLM_UNKNOWN_OPTION", "Did you mean max_tokens?"),
        ("llm_prompt('nobody', t)", "LLM_UNKNOWN_PROMPT", "nobody"),
    ],
)
def test_wrong_calls(echo: SparkSession, call: str, condition: str, says: str) -> None:
    with pytest.raises(AnalysisException) as error:
        echo.sql(f"SELECT {call} FROM (SELECT string(id) AS t FROM range(2))")
    assert error.value.getCondition() == condition
    assert says in str(error.value)


def test_spark_describes_every_function(echo: SparkSession) -> None:
    listed = {row.function for row in echo.sql("SHOW FUNCTIONS").collect()}
    for entry in entries():
        assert entry.name in listed
        rows = echo.sql(f"DESCRIBE FUNCTION EXTENDED {entry.name}").collect()
        text = "\n".join(row.function_desc for row in rows)
        assert f"Usage: {entry.name}(" in text
        assert "> SELECT" in text


def test_examples_of_the_descriptions_are_sql(echo: SparkSession) -> None:
    columns = "'x' AS body, 'x' AS topic, 'x' AS description, 'x' AS review, 'x' AS plot, 1 AS id"
    for table in ("mail", "topics", "posts", "products", "reviews", "films"):
        echo.sql(f"SELECT {columns}").createOrReplaceTempView(table)
    spark_llm.prompt("sentiment", "How does the reviewer feel?", choices=["good", "bad"])
    for entry in entries():
        for line in re.findall(r"> (.*);", entry.examples):
            echo.sql(line.replace("_FUNC_", entry.name))


def test_named_prompts(obedient: FakeModel) -> None:
    spark = obedient.spark
    spark_llm.prompt("Mood", "How does the reviewer feel?", choices=["good", "bad"], system="Be brief.")
    query = "SELECT llm_prompt('mood', 'x' AS review) AS a"
    query = "SELECT llm_prompt('mood', review) AS a FROM (SELECT 'x' AS review)"
    assert spark.sql(query).collect() == [Row(a="good")]
    [request] = obedient.requests()
    assert request.prompt == "How does the reviewer feel?\nAnswer with one of: good, bad.\nreview: x\n"
    assert '"Be brief."' in request.frame
    found = spark.sql("SELECT llm_prompt('mood', review, choices => array('up')) AS a FROM (SELECT 'x' AS review)")
    assert found.collect() == [Row(a="up")]
    spark_llm.prompt("MOOD", "Another?")
    assert spark.sql(query).collect() == [Row(a="answer to Another?")]
    with pytest.raises(LlmError, match="LLM_UNKNOWN_OPTION"):
        spark_llm.prompt("bad", "text", colour="red")
    with pytest.raises(LlmError, match="LLM_INVALID_RETURN_TYPE"):
        spark_llm.prompt("bad", "text", returns="BINARY")


def statements_of_the_page() -> list[list[str]]:
    """The statements of docs/ai-functions.md for those who come from Databricks, block by block."""
    section = DOCS.read_text("utf-8").split("## SQL from Databricks")[1].split("\n## ")[0]
    blocks = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    return [[statement.strip() for statement in f"{block}\n".split(";\n") if statement.strip()] for block in blocks]


# What Databricks' reference has for each function: (call, type of its result)
PUBLISHED = [
    ("ai_analyze_sentiment('I am happy')", "string"),
    ("""ai_classify("My password is leaked.", ARRAY("urgent", "not urgent"))""", "string"),
    (
        "ai_extract('John Doe lives in New York and works for Acme Corp.', "
        "array('person', 'location', 'organization'))",
        "struct<person:string,location:string,organization:string>",
    ),
    ("ai_fix_grammar('This sentence have some mistake')", "string"),
    ("ai_gen('Generate a concise, cheerful email title for a summer bike sale with 20% discount')", "string"),
    (
        "ai_mask('John Doe lives in New York. His email is john.doe@example.com.', array('person', 'email'))",
        "string",
    ),
    ("ai_similarity('Apache Spark', 'Apache Spark')", "float"),
    ("ai_translate('Hello, how are you?', 'es')", "string"),
]


def test_published_examples_run_unchanged(obedient: FakeModel) -> None:
    """The page shows each as it is published; it runs, gives the type that the reference names, and no NULL."""
    shown = {" ".join(statement.split()) for statement in statements_of_the_page()[0]}
    assert shown == {f"SELECT {call}" for call, _ in PUBLISHED}
    for call, kind in PUBLISHED:
        df = obedient.spark.sql(f"SELECT {call}")
        assert df.schema[0].dataType.simpleString() == kind, call
        [[value]] = df.collect()
        assert None not in (value if isinstance(value, Row) else [value]), call
    assert len(obedient.requests()) == len(PUBLISHED)


def test_examples_over_tables_run(obedient: FakeModel) -> None:
    shown = 0
    for statement in statements_of_the_page()[1]:
        rows = obedient.spark.sql(statement).collect()
        if not statement.startswith("CREATE"):
            assert rows, statement
            assert all(value is not None for row in rows for value in row), statement
            shown += 1
    assert shown >= 6
    assert obedient.requests()


@pytest.mark.model
def test_the_packaged_model_keeps_to_forms(spark: SparkSession) -> None:
    """End to end: labels, a type, a STRUCT and an error, with the real engine."""
    session = spark_llm.enable(spark.newSession())
    row = session.sql(
        """SELECT ai_classify(t, array('positive', 'negative'), confidence => true) AS label,
                  ai_filter('Does it praise the film?', t) AS praised,
                  llm('How many stars?', t, returns => 'TINYINT') AS stars,
                  ai_extract(t, array('actor', 'film')) AS found,
                  llm('Retell it.', t, returns => 'STRUCT<a: ARRAY<DATE> NOT NULL>', max_tokens => 2,
                      failOnError => false) AS short,
                  llm('One word.', t, usage => true, max_tokens => 3) AS paid
           FROM (SELECT /*+ REPARTITION(1) */ 'Tom Hanks is wonderful in this warm film.' AS t)"""
    ).first()
    assert row is not None
    assert row.label.result in ("positive", "negative")
    assert 0 < row.label.confidence <= 1
    assert row.praised in (True, False)
    assert -128 <= row.stars <= 127
    assert row.found.__fields__ == ["actor", "film"]
    assert row.short.result is None
    assert "[LLM_ANSWER_INCOMPLETE]" in row.short.errorMessage
    assert row.paid.usage.prompt_tokens > 10
    assert 1 <= row.paid.usage.output_tokens <= 3
