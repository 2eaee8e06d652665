"""Aggregates over answers: chunks and levels as computed by hand, any order of rows, what may stand beside them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import fake_counting
import pytest
from fake_counting import FakeModel
from pyspark.errors import AnalysisException, PythonException
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

import spark_llm
from spark_llm import functions as ai

pytestmark = pytest.mark.spark

# With chunks of 64 tokens, 3 bytes each: two thirds of 192 bytes; four answers of 12 tokens fit.
SIZE, FAN_IN = 128, 4
AGG = "ai_agg(t, 'What is wrong?', max_tokens => 12)"


@pytest.fixture
def small(model: FakeModel) -> FakeModel:
    """Small chunks; r: groups a (as large as four levels), b (few, equal and NULL texts), c (NULL only), NULL."""
    model.spark.conf.set("spark.llm.aggregate.chunkLength", "64")
    model.spark.sql(
        r"""SELECT 'a' AS g, concat('complaint number ', id) AS t, id AS n FROM range(100)
            UNION ALL SELECT * FROM VALUES ('b', 'late', 1), ('b', 'late', 2), ('b', NULL, 3),
              ('b', 'it\'s \\ "broken"\n', 4), ('c', NULL, 1), ('c', NULL, 2), (NULL, 'lost', 1)"""
    ).createOrReplaceTempView("r")
    return model


def expected_calls(texts: Sequence[str]) -> list[int]:
    """How many calls each level makes for one group."""
    chunks: dict[int, int] = defaultdict(int)
    start = 0
    for text, count in sorted(Counter(texts).items(), key=lambda item: item[0].encode()):
        chunks[start // SIZE] += 1
        start += len((text if count == 1 else f"({count} times) {text}").encode()) + 3
    calls = [len(chunks)]
    numbers = sorted(chunks)
    while len(numbers) > 1:
        parts = Counter(number // FAN_IN for number in numbers)
        calls.append(sum(count > 1 for count in parts.values()))
        numbers = sorted(parts)
    return calls


def listed(prompt: str) -> list[str]:
    """The texts, or answers, that a prompt has."""
    found: list[str] = json.loads(prompt.splitlines()[-1].split(": ", 1)[1])
    return found


def test_calls_are_those_of_the_levels_in_any_order_of_rows(small: FakeModel) -> None:
    spark = small.spark
    answers, prompts = [], []
    for hint in ("REPARTITION(1)", "REPARTITION(7, n)"):
        small.forget()
        query = f"SELECT g, {AGG} AS a FROM (SELECT /*+ {hint} */ * FROM r ORDER BY n % 5, n DESC) GROUP BY g"
        answers.append(sorted(spark.sql(query).collect(), key=str))
        prompts.append(sorted(request.prompt for request in small.requests()))
    assert answers[0] == answers[1]
    assert prompts[0] == prompts[1]

    groups = [
        [f"complaint number {number}" for number in range(100)],
        ["late", "late", 'it\'s \\ "broken"\n'],
        ["lost"],
    ]
    levels = [expected_calls(texts) for texts in groups]
    assert levels[0][0] > FAN_IN**2
    assert len(levels[0]) == 4
    first = [listed(prompt) for prompt in prompts[0] if "\ntexts: " in prompt]
    later = [listed(prompt) for prompt in prompts[0] if "\nanswers: " in prompt]
    assert len(first) == sum(calls[0] for calls in levels)
    assert len(later) == sum(sum(calls[1:]) for calls in levels)
    assert len(first) + len(later) == len(prompts[0])
    assert sorted(text for texts in first for text in texts) == sorted(
        [*groups[0], "(2 times) late", 'it\'s \\ "broken"\n', "lost"]
    )
    assert all(2 <= len(parts) <= FAN_IN for parts in later)
    assert all(prompt.startswith("What is wrong?\n") for prompt in prompts[0])
    found = {row.g: row.a for row in answers[0]}
    assert set(found) == {"a", "b", "c", None}
    assert found["c"] is None
    assert None not in (found["a"], found["b"], found[None])


@pytest.mark.slow
def test_other_aggregates_filter_having_and_distinct(small: FakeModel) -> None:
    spark = small.spark
    alone = {row.g: row.a for row in spark.sql(f"SELECT g, {AGG} AS a FROM r GROUP BY g").collect()}
    small.forget()
    query = f"""SELECT upper(g) AS u, count(*) AS rows, {AGG} AS a, sum(n) + 1 AS s,
                       {AGG.replace("(t", "(DISTINCT t")} FILTER (WHERE n < 3) AS few
                FROM r GROUP BY g HAVING count(*) < 10 AND ({AGG} IS NOT NULL OR g = 'c') ORDER BY u NULLS FIRST"""
    rows = spark.sql(query).collect()
    assert [(row.u, row.rows, row.a, row.s) for row in rows] == [
        (None, 1, alone[None], 2),
        ("B", 4, alone["b"], 11),
        ("C", 2, None, 4),
    ]
    assert rows[0].few == alone[None]  # the same texts
    texts = [listed(request.prompt) for request in small.requests() if "\ntexts: " in request.prompt]
    assert ["late"] in texts
    assert rows[2].few is None


@pytest.mark.slow
def test_without_keys_over_nothing_and_in_a_subquery(small: FakeModel) -> None:
    spark = small.spark
    assert spark.sql(f"SELECT {AGG} AS a FROM r WHERE n > 1000").collect() == [Row(a=None)]
    assert spark.sql(f"SELECT {AGG} AS a, count(*) AS n FROM r WHERE n > 1000").collect() == [Row(a=None, n=0)]
    assert small.requests() == []
    query = f"""SELECT DISTINCT g, (SELECT {AGG} FROM r AS i WHERE i.g = o.g) AS a,
                       (SELECT {AGG} FROM r WHERE g = 'b') AS b FROM r AS o WHERE g IN ('b', 'c')"""
    [b, c] = sorted(spark.sql(query).collect())
    assert b.a == b.b == c.b
    assert b.a is not None
    assert c.a is None


@pytest.mark.slow
def test_columns_and_explain(small: FakeModel) -> None:
    frame = small.spark.table("r").where("g = 'b'").groupBy("g")
    found = frame.agg(
        ai.ai_agg("t", "What is wrong?", max_tokens=12).alias("a"), ai.ai_summarize_agg(F.col("t")).alias("s")
    )
    plan = found._jdf.queryExecution().toString()
    assert "ArrowEvalPython [llm({" in plan.split("== Optimized Logical Plan ==")[1]
    assert "llm_aggregate" not in plan.split("== Optimized Logical Plan ==")[1]
    row = found.first()
    assert row is not None
    prompts = [request.prompt for request in small.requests()]
    assert sum(prompt.startswith("Summarize what these texts say.\n") for prompt in prompts) == 1
    assert found.schema["a"].dataType.simpleString() == "string"


@pytest.mark.slow
def test_a_chunk_that_fails_leaves_no_answer_about_the_rest(small: FakeModel) -> None:
    spark = small.spark
    spark.sql("SELECT * FROM r UNION ALL SELECT 'a', 'fail', 0").createOrReplaceTempView("failing")
    query = f"SELECT g, {AGG} AS a FROM failing WHERE g < 'c' GROUP BY g"
    found = {row.g: row.a for row in spark.sql(query).collect()}
    assert found["a"] is None
    assert found["b"] is not None
    with pytest.raises(PythonException, match="LLM_"):
        spark.sql(query.replace("=> 12", "=> 12, failOnError => true")).collect()


@pytest.mark.slow
def test_one_large_group_has_small_rows(model: FakeModel) -> None:
    rows = 200_000
    [row] = model.spark.sql(f"SELECT ai_agg('t' || id, 'What?') AS a, max(id) AS m FROM range({rows})").collect()
    assert row.m == rows - 1
    assert row.a is not None
    lists = [listed(request.prompt) for request in model.requests() if "\ntexts: " in request.prompt]
    assert sum(map(len, lists)) == rows
    assert max(len("".join(texts).encode()) + 3 * len(texts) for texts in lists) <= 2048 * 3
    answers = [listed(request.prompt) for request in model.requests() if "\nanswers: " in request.prompt]
    assert max(map(len, answers)) <= 2048 // (128 + 4)
    assert len(lists) > 15**2


@pytest.fixture
def grader(spark: SparkSession, tmp_path: Path) -> Iterator[FakeModel]:
    """A model whose grade is the number at the end of a text."""
    answers = lambda message: message.strip().rsplit(" ", 1)[1]  # noqa: E731
    with fake_counting.fake_model(spark, tmp_path, reads_order=False, answers=answers) as found:
        yield found


def test_top_k(grader: FakeModel) -> None:
    spark = grader.spark
    spark.sql(
        """SELECT id % 2 AS g, concat('text ', id, ' of ', id % 11) AS t FROM range(60)
           UNION ALL SELECT 0, 'text 21 of 10' FROM range(5) UNION ALL SELECT 2, NULL"""
    ).createOrReplaceTempView("r")
    best = ["text 10 of 10", "text 21 of 10", "text 32 of 10", "text 54 of 10", "text 20 of 9"]
    query = "SELECT g, ai_top_k(t, 'is good', 5) AS best FROM r GROUP BY g ORDER BY g"
    rows = spark.sql(query).collect()
    assert rows[0].best == best  # the best first, equal grades by text, equal texts once
    assert rows[2].best == []
    assert grader.engine_calls() == 60  # one for each text, also where it is in two groups
    assert {request.choices or tuple(request.constraint["choices"]) for request in grader.requests()} == {  # type: ignore[index]
        tuple(map(str, range(11)))
    }
    beside = spark.table("r").groupBy("g").agg(ai.ai_top_k("t", "is good", 5).alias("best"), F.count("*").alias("n"))
    assert [row.best for row in beside.orderBy("g").collect()] == [row.best for row in rows]
    assert spark.sql("SELECT ai_top_k(t, 'is good', 1) AS b FROM r WHERE g > 5").collect() == [Row(b=[])]


@pytest.mark.parametrize(
    ("call", "condition", "says"),
    [
        ("ai_agg(t, t)", "LLM_OPTION_NOT_CONSTANT", "instruction"),
        ("ai_agg(t, ' ')", "LLM_INVALID_CALL", "instruction must be a constant STRING"),
        ("ai_agg(t, 'q', confidence => true)", "LLM_INVALID_CALL", "takes no confidence"),
        ("ai_agg(t, 'q', failOnError => false)", "LLM_INVALID_CALL", "failOnError can only be true"),
        ("ai_agg(t, 'q', returns => 'INT')", "LLM_INVALID_CALL", "takes no returns"),
        ("ai_top_k(t, 'q', 0)", "LLM_INVALID_CALL", "from 1 to"),
        ("ai_agg(t, 'q') OVER ()", "LLM_AGGREGATE_UNSUPPORTED", "window"),
        ("ai_agg(r, 'q'), count(*)", "LLM_AGGREGATE_UNSUPPORTED", "differs each time"),
    ],
)
def test_wrong_calls(model: FakeModel, call: str, condition: str, says: str) -> None:
    with pytest.raises(AnalysisException) as error:
        model.spark.sql(f"SELECT {call} FROM (SELECT string(id) AS t, string(rand()) AS r FROM range(2))").collect()
    assert error.value.getCondition() == condition
    assert says in str(error.value)
    assert model.requests() == []


@pytest.mark.model
def test_the_packaged_model_answers(spark: SparkSession) -> None:
    session = spark_llm.enable(spark.newSession())
    row = session.sql(
        """SELECT ai_agg(t, 'What do customers complain about?', max_tokens => 16) AS a, ai_top_k(t, 'is angry', 1) AS k
           FROM VALUES ('The parcel came late.'), ('I am furious, it is broken!') AS r(t)"""
    ).first()
    assert row is not None
    assert row.a
    assert len(row.k) == 1
