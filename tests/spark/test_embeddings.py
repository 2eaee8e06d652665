"""ai_embed and ai_similarity: their types, what they ask, what rules do about them; here with a fake encoder."""

from __future__ import annotations

import itertools
import json
import math
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_counting import FakeModel, fake_model
from plans import assert_idempotent, exchanges, rows, sorts, specs, text
from pyspark.errors import AnalysisException, PythonException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import spark_llm
from spark_llm import functions as ai
from spark_llm.functions.embeddings import cosine_of_arrays

pytestmark = pytest.mark.spark

LETTERS = string.ascii_lowercase
IN_SUBQUERY = hasattr(F, "vector_cosine_similarity")  # a constant beside a column: of older Sparks asked in each task


def vector(message: str) -> list[float]:
    """The fake encoder's vector of a text: how often each letter stands in it."""
    return [float(message.count(letter)) for letter in LETTERS]


def cosine(one: str, other: str) -> float:
    a, b = vector(one), vector(other)
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


@pytest.fixture
def encoder(spark: SparkSession, tmp_path: Path) -> Iterator[FakeModel]:
    """A fake encoder that counts letters; texts that begin with 'odd' get no vector, other prompts get yes or no.
    Its table t has five texts in two partitions, one of them twice and one NULL."""

    def answer(message: str) -> str:
        if message.startswith("odd"):
            return '["no", "vector"]'
        if message.startswith("Is"):
            return "yes" if "o" in message.splitlines()[1] else "no"
        return json.dumps([float(message.count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"])

    with fake_model(spark, tmp_path, reads_order=False, answers=answer) as found:
        texts = ["a good film", "so bad", "a good film", None, "very long", "bad"]
        frame = found.spark.createDataFrame([(number, each) for number, each in enumerate(texts)], "id int, t string")
        frame.repartition(2).createOrReplaceTempView("t")
        found.spark.conf.set("spark.llm.optimizer.statistics.enabled", "false")
        yield found


CALLS = [
    ("ai_embed(t)", lambda: ai.ai_embed("t"), "array<float>"),
    ("ai_embed(text => t, model => 'other')", lambda: ai.ai_embed("t", model="other"), "array<float>"),
    (
        "ai_embed(t, failOnError => false, usage => true, truncate => 'longest')",
        lambda: ai.ai_embed("t", failOnError=False, usage=True, truncate="longest"),
        "struct<result:array<float>,errorMessage:string,"
        "usage:struct<prompt_tokens:bigint,cached_tokens:bigint,output_tokens:bigint>>",
    ),
    ("ai_similarity(t, u)", lambda: ai.ai_similarity("t", "u"), "float"),
    ("ai_similarity(expr2 => u, expr1 => t)", lambda: ai.ai_similarity("t", F.col("u")), "float"),
]


def test_types_and_the_same_calls_from_python(echo: SparkSession) -> None:
    table = echo.sql("SELECT 'x' AS t, 'y' AS u FROM range(2)").cache()
    table.createOrReplaceTempView("texts")
    for sql, column, kind in CALLS:
        by_sql = echo.sql(f"SELECT {sql} FROM texts")
        assert by_sql.schema[0].dataType.simpleString() == kind, sql
        assert table.select(column()).sameSemantics(by_sql), sql
    constant = echo.sql("SELECT ai_embed('x'), ai_similarity(t, 'it is'), ai_similarity(t, NULL) FROM texts")
    assert [field.dataType.simpleString() for field in constant.schema] == ["array<float>", "float", "float"]
    assert constant.columns == ["ai_embed(x)", "ai_similarity(t, it is)", "ai_similarity(t, NULL)"]


def test_vectors_and_what_is_asked(encoder: FakeModel) -> None:
    found = encoder.spark.sql("SELECT t, ai_embed(t) AS v FROM t").collect()
    assert all(row.v == (None if row.t is None else vector(row.t)) for row in found)
    assert len(found) == 6
    asked = encoder.requests()
    assert sorted(request.prompt for request in asked) == ["a good film", "a good film", "bad", "so bad", "very long"]
    assert encoder.engine_calls() == 4
    assert all(request.constraint is None for request in asked)
    report = spark_llm.last_report(encoder.spark)
    assert report is not None
    assert (report.rows, report.nulls, report.failed) == (6, 1, 0)
    assert list(report.by_call) == ["(a text to embed for each row)"]


def test_similarity_asks_a_constant_once(encoder: FakeModel) -> None:
    found = encoder.spark.sql("SELECT t, ai_similarity(t, 'a ' || 'bad' || ' film') AS s FROM t").collect()
    for row in found:
        assert row.s == (None if row.t is None else pytest.approx(cosine(row.t, "a bad film"), abs=1e-6))
    asked = [request.prompt for request in encoder.requests()]
    assert asked.count("a bad film") == 1 or not IN_SUBQUERY
    assert encoder.engine_calls() == 5


def test_null_constants_ask_nothing(encoder: FakeModel) -> None:
    found = encoder.spark.sql(
        "SELECT ai_similarity(t, CAST(NULL AS STRING)) AS s, ai_embed(NULL) AS v FROM t"
    ).collect()
    assert {(row.s, row.v) for row in found} == {(None, None)}
    assert encoder.requests() == []


def test_two_columns_and_equal_texts(encoder: FakeModel) -> None:
    found = encoder.spark.sql(
        "SELECT a.t AS one, b.t AS other, ai_similarity(a.t, b.t) AS s FROM t AS a JOIN t AS b ON a.id <= b.id"
    ).collect()
    known = [row for row in found if row.one is not None and row.other is not None]
    assert all(row.s == pytest.approx(cosine(row.one, row.other), abs=1e-6) for row in known)
    assert {row.s for row in known if row.one == row.other} == {1.0}
    assert all(row.s is None for row in found if row.one is None or row.other is None)


def test_top_texts(encoder: FakeModel) -> None:
    query = "SELECT t FROM t WHERE t IS NOT NULL ORDER BY ai_similarity(t, 'bad') DESC LIMIT 2"
    assert [row.t for row in encoder.spark.sql(query).collect()] == ["bad", "so bad"]
    asked = sum(request.prompt == "bad" for request in encoder.requests())
    assert asked == 2 or not IN_SUBQUERY  # of the table, and of the query
    assert encoder.engine_calls() == 4
    frame = encoder.spark.table("t").orderBy(ai.ai_similarity("t", F.lit("bad")).desc()).select("t").limit(1)
    assert frame.collect() == [("bad",)]


def test_a_join_on_similarity_embeds_each_side_once(encoder: FakeModel) -> None:
    query = "SELECT a.id, b.id FROM t AS a JOIN t AS b ON a.id < b.id AND ai_similarity(a.t, b.t) > 0.99"
    assert encoder.spark.sql(query).collect() == [(0, 2)]
    assert len(encoder.requests()) <= 10  # of 15 pairs; five texts on each side
    assert encoder.engine_calls() == 4


def test_texts_without_a_direction(encoder: FakeModel) -> None:
    assert encoder.spark.sql("SELECT ai_similarity(t, '123') FROM t WHERE id = 0").collect() == [(None,)]
    assert encoder.spark.sql("SELECT ai_embed('')").collect() == [([0.0] * 26,)]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], 0.97463185),
        ([1.0, 0.0], [0.0, 2.0], 0.0),
        ([3.0, 4.0], [-3.0, -4.0], -1.0),
        ([0.1, 0.7, 0.33], [0.1, 0.7, 0.33], 1.0),
        ([0.0, 0.0], [1.0, 2.0], None),
        (None, [1.0], None),
        ([1.0, None], [1.0, 2.0], None),
    ],
)
def test_the_cosine_of_older_sparks(
    spark: SparkSession, one: list[float] | None, other: list[float], expected: float | None
) -> None:
    frame = spark.createDataFrame([(one, other)], "a array<float>, b array<float>")
    found = frame.select(cosine_of_arrays(F.col("a"), F.col("b")).alias("s"))
    assert found.schema["s"].dataType.simpleString() == "float"
    assert found.collect() == [(None if expected is None else pytest.approx(expected, abs=1e-7),)]


def test_rows_that_fail(encoder: FakeModel) -> None:
    spark = encoder.spark
    spark.sql("SELECT * FROM VALUES ('good'), ('fail'), ('odd') AS f(t)").createOrReplaceTempView("f")
    found = {row.t: row.v for row in spark.sql("SELECT t, ai_embed(t, failOnError => false) AS v FROM f").collect()}
    assert (found["good"].result, found["good"].errorMessage) == (vector("good"), None)
    assert found["fail"].result is None
    assert "[LLM_FAKE]" in found["fail"].errorMessage
    assert found["odd"].result is None
    assert "[LLM_INVALID_ANSWER]" in found["odd"].errorMessage
    assert "no array of numbers" in found["odd"].errorMessage
    plain = {row.t: row.v for row in spark.sql("SELECT t, ai_embed(t) AS v FROM f").collect()}
    assert plain == {"good": vector("good"), "fail": None, "odd": None}
    by_rows = spark.sql("SELECT t, ai_similarity(t, 'good') AS s FROM f").collect()
    assert {row.t: row.s for row in by_rows} == {"good": pytest.approx(1.0), "fail": None, "odd": None}
    with pytest.raises(PythonException, match="LLM_ROW_FAILED"):
        spark.sql("SELECT ai_embed(t, failOnError => true) FROM f").collect()


def test_a_constant_that_cannot_be_embedded_fails_the_query_before_rows_are_asked(encoder: FakeModel) -> None:
    spark = encoder.spark
    for query in ("SELECT id FROM t WHERE ai_similarity(t, 'fail') > -1", "SELECT ai_embed('fail')"):
        with pytest.raises(Exception, match=r"LLM_ROW_FAILED.*LLM_FAKE"):
            spark.sql(query).collect()
    if IN_SUBQUERY:
        assert {request.prompt for request in encoder.requests()} == {"fail"}
    told = spark.sql("SELECT ai_embed('fail', failOnError => false).errorMessage AS e FROM t").first()
    assert told is not None
    assert "[LLM_FAKE]" in told.e


@pytest.mark.parametrize(
    ("call", "condition", "says"),
    [
        ("ai_embed(t, temperature => 0.5)", "LLM_INVALID_CALL", "it takes no temperature"),
        ("ai_embed(t, max_tokens => 5)", "LLM_INVALID_CALL", "it takes no max_tokens"),
        ("ai_embed(t, returns => 'STRING')", "LLM_INVALID_CALL", "its answer is ARRAY<FLOAT>"),
        ("ai_embed(t, system => 'x')", "LLM_INVALID_CALL", "it takes no system"),
        ("ai_similarity(t, t, confidence => true)", "LLM_INVALID_CALL", "its answer is FLOAT"),
        ("ai_similarity(t, t, usage => true)", "LLM_INVALID_CALL", "it takes no usage"),
        ("ai_similarity(t, t, failOnError => false)", "LLM_INVALID_CALL", "can only be true. Leave it out for NULL"),
        ("ai_similarity(t)", "LLM_INVALID_CALL", "argument expr2 is missing"),
        ("ai_similarity(t, 7)", "LLM_INVALID_CALL", "expr2 must be a STRING, but 7 is INT"),
        ("ai_embed(t, truncate => 'all')", "LLM_INVALID_OPTION", "'longest'"),
        ("ai_embed(t, modle => 'x')", "LLM_UNKNOWN_OPTION", "model"),
    ],
)
def test_wrong_calls(echo: SparkSession, call: str, condition: str, says: str) -> None:
    with pytest.raises(AnalysisException) as raised:
        echo.sql(f"SELECT {call} FROM VALUES ('x') AS v(t)")
    assert raised.value.getCondition() == condition
    assert says in str(raised.value)


def test_described(echo: SparkSession) -> None:
    [[shown]] = (
        echo.sql("DESCRIBE FUNCTION EXTENDED ai_similarity")
        .groupBy()
        .agg(F.concat_ws("\n", F.collect_list("function_desc")))
        .collect()
    )
    assert "ai_similarity(expr1, expr2" in shown
    assert "option - by name: model, truncate, failOnError." in shown


def test_prompt_rules_leave_embeddings_alone(encoder: FakeModel) -> None:
    query = encoder.spark.sql("SELECT ai_embed(t) AS v, ai_gen(t) AS a, ai_gen(t, max_tokens => 9) AS b FROM t")
    shown = text(query)
    assert shown.count("[llm_group(") == 1  # of ai_gen's two calls
    assert shown.count("[llm(spec, t)]") == 1
    embedded = [spec for spec in specs(query) if spec.task == "embed"]
    assert [spec.prompt for spec in embedded] == [None]
    alone = encoder.spark.sql("SELECT ai_embed(t) FROM t")
    assert sorts(alone) == []
    assert exchanges(alone) == []
    assert [plan.order_why for plan in rows(alone)] == ["as they come: texts to embed share no prefix"]
    assert [plan.fold for plan in rows(alone)] == [True]
    assert_idempotent(alone)


def test_a_condition_on_embeddings_comes_before_other_calls(encoder: FakeModel) -> None:
    query = encoder.spark.sql(
        "SELECT id FROM t WHERE llm('Is it good?', t) = 'yes' AND ai_similarity(t, 'good') > 0.6 AND id < 9 ORDER BY id"
    )
    assert_idempotent(query)
    assert [row.id for row in query.collect()] == [0, 2]
    asked = {request.prompt for request in encoder.requests() if request.prompt.startswith("Is")}
    assert asked == {"Is it good?\nt: a good film\n"}
    why = [note for call in spark_llm.explain(query, mode="plan").calls for note in call.notes]
    assert any("drops rows before other calls" in note.why for note in why if note.fired)


@pytest.mark.parametrize(
    ("query", "ids", "good"),
    [
        (  # an embedding of an answer: it can stand below the other call, not below the one that it needs
            "SELECT id FROM (SELECT id, ai_gen('so ' || t) AS a, t FROM t) "
            "WHERE ai_similarity(a, '123') IS NULL AND llm('Is it good?', t) = 'yes'",
            [0, 1, 2, 4],
            {"a good film", "so bad", "very long", "bad"},
        ),
        (  # columns between, the vector in the result, another condition
            "SELECT id, v, u FROM (SELECT id, t, upper(t) AS u, ai_embed(t) AS v FROM t) "
            "WHERE llm('Is it good?', t) = 'yes' AND v[6] > 0 AND u <> 'X'",
            [0, 2, 4],
            {"a good film", "very long"},
        ),
        (  # of two columns, one of them computed
            "SELECT id FROM t WHERE llm('Is it good?', t) = 'yes' AND ai_similarity(t, t || ' film') > 0.9",
            [0, 2],
            {"a good film"},
        ),
        (  # an answer and a vector in one condition
            "SELECT id FROM t WHERE llm('Is it good?', t) = if(ai_embed(t)[6] > 0, 'yes', 'none')",
            [0, 2, 4],
            {"a good film", "so bad", "very long", "bad"},
        ),
        (  # some rows need no vector
            "SELECT id FROM t WHERE llm('Is it good?', t) = 'yes' AND (ai_similarity(t, 'good') > 0.6 OR id = 1)",
            [0, 1, 2],
            {"a good film", "so bad"},
        ),
        (
            "SELECT id FROM t WHERE llm('Is it good?', t) = 'yes' "
            "AND CASE WHEN id < 4 THEN ai_similarity(t, 'good') > 0.6 ELSE id = 5 END",
            [0, 2],
            {"a good film", "bad"},
        ),
    ],
)
def test_conditions_on_embeddings_and_answers(encoder: FakeModel, query: str, ids: list[int], good: set[str]) -> None:
    frame = encoder.spark.sql(query)
    assert_idempotent(frame)
    found = sorted(frame.collect())
    assert [row.id for row in found] == ids
    assert asked_if_good(encoder) == good
    encoder.spark.sql("SET spark.llm.optimizer.enabled = false")
    assert sorted(encoder.spark.sql(query).collect()) == found


def asked_if_good(encoder: FakeModel) -> set[str]:
    """The texts that a call other than an embedding was asked about."""
    asked = (request.prompt for request in encoder.requests() if request.prompt.startswith("Is"))
    return {prompt.removeprefix("Is it good?\nt: ").removesuffix("\n") for prompt in asked}


@pytest.mark.parametrize(
    ("query", "found", "good"),
    [
        (
            "SELECT id, llm('Is it good?', t) AS a FROM t ORDER BY ai_similarity(t, 'very lon') DESC LIMIT 1",
            [(4, "yes")],
            {"very long"},
        ),
        (
            "SELECT id, ai_similarity(t, 'bad') IS NULL AS n, llm('Is it good?', t) AS a FROM t "
            "ORDER BY ai_gen('so ' || t), id LIMIT 2",
            None,
            None,
        ),
        (
            "SELECT id FROM t JOIN VALUES (0), (1), (9) AS k(n) ON id = n "
            "WHERE llm('Is it good?', t) = 'yes' AND ai_similarity(t, 'good') > 0.6",
            [(0,)],
            {"a good film"},
        ),
    ],
)
def test_limits_and_joins_with_an_embedding_and_a_call(
    encoder: FakeModel, query: str, found: list[tuple[object, ...]] | None, good: set[str] | None
) -> None:
    frame = encoder.spark.sql(query)
    assert_idempotent(frame)
    rows_found = frame.collect()
    if found is None:
        assert len({request.prompt for request in encoder.requests() if request.prompt.startswith("so ")}) == 4
        assert len(asked_if_good(encoder)) <= 2
    else:
        assert rows_found == found
        assert asked_if_good(encoder) == good
    encoder.spark.sql("SET spark.llm.optimizer.enabled = false")
    assert encoder.spark.sql(query).collect() == rows_found


def test_a_join_that_drops_rows_runs_before_an_embedding(encoder: FakeModel) -> None:
    encoder.spark.conf.set("spark.llm.optimizer.statistics.enabled", "true")
    encoder.spark.sql(
        "SELECT * FROM VALUES (0, 'a good film'), (1, 'so bad'), (2, 'very long'), (3, 'bad') AS v(id, t)"
    ).createOrReplaceTempView("v")
    query = "SELECT v.id FROM v JOIN VALUES (0), (1), (9) AS k(n) ON v.id = n WHERE ai_similarity(t, 'bad') > 0.7"
    frame = encoder.spark.sql(query)
    assert_idempotent(frame)
    assert [row.id for row in frame.collect()] == [1]
    assert {request.prompt for request in encoder.requests()} == {"a good film", "so bad", "bad"}


def test_aggregates_over_answers_share_an_embedding_filter(encoder: FakeModel) -> None:
    encoder.spark.conf.set("spark.sql.optimizer.maxIterations", "10")  # after so many rounds the rules have to be done
    query = encoder.spark.sql(
        "SELECT ai_agg(t, 'Is what?') AS a, ai_agg(t, 'Is why?') AS b FROM t WHERE ai_similarity(t, 'bad') > 0.5"
    )
    assert_idempotent(query)
    kinds = [line.strip(" :+-").split(" ")[0] for line in text(query).splitlines()]
    assert ("RepartitionByExpression",) * 2 not in itertools.pairwise(kinds)
    assert len(query.collect()) == 1
    embedded = Counter(request.prompt for request in encoder.requests() if not request.prompt.startswith("Is"))
    assert embedded.keys() == {"a good film", "so bad", "very long", "bad"}
    if not IN_SUBQUERY:
        del embedded["bad"]
    assert embedded <= Counter({"a good film": 2, "so bad": 1, "very long": 1, "bad": 2})  # rows, and the constant


def test_limits_masks_and_equal_calls(encoder: FakeModel) -> None:
    spark = encoder.spark
    assert len(spark.sql("SELECT id, ai_embed(t) FROM t ORDER BY id LIMIT 2").collect()) == 2
    assert len(encoder.requests()) == 2
    encoder.forget()
    spark.sql("SELECT CASE WHEN id = 5 THEN ai_embed(t) END FROM t").collect()
    assert [request.prompt for request in encoder.requests()] == ["bad"]
    encoder.forget()
    spark.sql("SELECT s FROM (SELECT t, ai_similarity(t, 'bad') AS s FROM t) WHERE s > 0.1 ORDER BY s").collect()
    assert encoder.engine_calls() == 4
    encoder.forget()
    [found] = spark.sql("SELECT t FROM t WHERE ai_similarity(t, 'bad') > 0.9 LIMIT 1").collect()
    assert found.t == "bad"
    assert {request.prompt for request in encoder.requests()} <= {"a good film", "so bad", "bad", "very long"}


def test_explained(encoder: FakeModel) -> None:
    query = encoder.spark.sql("SELECT ai_similarity(t, 'bad') AS s FROM t")
    calls = spark_llm.explain(query, mode="plan").calls
    assert all(call.estimate.output_tokens.value == 0 for call in calls)
    placed = {call.prompt: call.placement for call in calls}
    assert set(placed) == {"bad", "(a text to embed for each row)"}
    assert placed["bad"].startswith("asked once for the query")
    shown = str(spark_llm.explain(query, mode="analyze"))
    assert "embeddings by encoders of" in shown
    assert "share no prefix" in shown


def test_a_budget_counts_embeddings(encoder: FakeModel) -> None:
    encoder.spark.conf.set("spark.llm.budget.maxCalls", 2)
    encoder.spark.conf.set("spark.llm.budget.onExceeded", "partial")
    found = encoder.spark.sql("SELECT ai_embed(t) AS v FROM t").collect()
    assert sum(row.v is not None for row in found) in (2, 3)  # 'a good film' is there twice
