"""Aggregates over answers: chunks and levels as computed by hand, any order of rows, what may stand beside them."""

from __future__ import annotations

import importlib
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

# With chunks of 64 tokens, 3 bytes each, that begin every two thirds of 192 bytes; four answers of 12 tokens fit.
SIZE, LONGEST, FAN_IN = 128, 64, 4
AGG = "ai_agg(t, 'What is wrong?', max_tokens => 12)"


def halves(letters: str, mark: str) -> list[str]:
    """Texts, two of which are as long as a chunk, with what stands between texts."""
    return [f"{letter}{mark * (LONGEST - 4)}" for letter in letters]


GROUPS = {
    "many": [f"complaint number {number:02} {'.' * 40}" for number in range(40)],
    "few": ["late", "late", 'it\'s \\ "broken"\n', None],
    "one": ["lost"],
    "none": [None, None],
    "empty": ["", ""],
    "two chunks exactly": halves("abcd", "1"),
    "a chunk and a text": halves("abc", "2"),
    "four chunks": halves("abcdefgh", "3"),
    "five chunks": halves("abcdefghi", "4"),
    "each too long": [f"{number}" * 300 for number in range(7)],
    "long characters": ["\N{SLIGHTLY SMILING FACE}" * 40 + "x" * 500, "é" * 33, "é" * 32],
    None: ["without a key"],
}
FEW = ["few", "one", "none", None]


@pytest.fixture
def small(model: FakeModel) -> FakeModel:
    """Small chunks; r and few (g, t, n): the texts of all GROUPS and of those in FEW."""
    model.spark.conf.set("spark.llm.aggregate.chunkLength", "64")
    for view, groups in (("r", [*GROUPS]), ("few", FEW)):
        rows = [(group, text, n) for group in groups for n, text in enumerate(GROUPS[group])]
        values = ", ".join(f"({literal(group)}, {literal(text)}, {n})" for group, text, n in rows)
        model.spark.sql(f"SELECT * FROM VALUES {values} AS r(g, t, n)").createOrReplaceTempView(view)
    return model


def literal(text: str | None) -> str:
    escaped = (text or "").replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "CAST(NULL AS STRING)" if text is None else f"'{escaped}'"


def lines_of(texts: Sequence[str | None]) -> list[str]:
    """What a group's prompts show, in their order."""
    found = []
    for text, count in sorted(Counter(filter(lambda text: text is not None, texts)).items(), key=_bytes):
        size = len(text.encode())
        line = text if size <= LONGEST else f"{text[: LONGEST * len(text) // size]}…"
        found.append(line if count == 1 else f"({count} times) {line}")
    return found


def _bytes(item: tuple[str, int]) -> bytes:
    return item[0].encode()


def expected_calls(texts: Sequence[str | None]) -> list[int]:
    """How many calls each level makes for one group."""
    chunks: dict[int, int] = defaultdict(int)
    start = 0
    for line in lines_of(texts):
        chunks[start // SIZE] += 1
        start += len(line.encode()) + 3
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
    query = f"""SELECT copy, g, {AGG} AS a
                FROM ((SELECT /*+ REPARTITION(1) */ 1 AS copy, * FROM r ORDER BY n)
                      UNION ALL (SELECT /*+ REPARTITION(7, n) */ 2 AS copy, * FROM r ORDER BY n % 5, n DESC))
                GROUP BY copy, g"""
    rows = small.spark.sql(query).collect()
    found = {row.g: row.a for row in rows if row["copy"] == 1}
    assert found == {row.g: row.a for row in rows if row["copy"] == 2}
    assert len(rows) == 2 * len(GROUPS)
    assert set(found) == set(GROUPS)
    assert [group for group, answer in found.items() if answer is None] == ["none"]

    prompts = {request.prompt for request in small.requests()}  # the copies' are the same
    levels = {group: expected_calls(texts) for group, texts in GROUPS.items()}
    assert levels["many"][0] > FAN_IN**2
    assert len(levels["many"]) == 4
    assert [levels[f"{number} chunks"][0] for number in ("four", "five")] == [4, 5]
    assert levels["two chunks exactly"] == levels["a chunk and a text"] == [2, 1]
    first = [listed(prompt) for prompt in prompts if "\ntexts: " in prompt]
    later = [listed(prompt) for prompt in prompts if "\nanswers: " in prompt]
    assert len(first) == sum(calls[0] for calls in levels.values())
    assert len(later) == sum(sum(calls[1:]) for calls in levels.values())
    assert len(first) + len(later) == len(prompts)
    assert sorted(text for texts in first for text in texts) == sorted(
        line for texts in GROUPS.values() for line in lines_of(texts)
    )
    assert all(2 <= len(parts) <= FAN_IN for parts in later)
    assert all(prompt.startswith("What is wrong?\n") for prompt in prompts)


@pytest.mark.parametrize(
    ("source", "levels"),
    [
        ("VALUES ('a')", 1),
        ("(SELECT id AS col1 FROM range(500))", 3),  # at most 8 KiB each: 1,000 chunks of 4 KiB; 15 answers a prompt
        ("(SELECT explode(sequence(1, 1000000)) AS col1)", 6),  # nobody knows: 4 GiB
        ("(SELECT id AS col1 FROM numbers)", 2),  # a table of a few bytes
        ("(SELECT concat('number ', id, '.') AS col1 FROM numbers)", 2),
        ("(SELECT repeat(id, 3000) AS col1 FROM numbers)", 6),  # much of little
        ("(SELECT concat(s, s, s) AS col1 FROM numbers)", 6),
        ("(SELECT llm('Tell a story', id) AS col1 FROM numbers)", 7),  # nobody knows, and the call that makes the text
        ("(SELECT id AS col1 FROM range(1000000) LIMIT 5)", 1),
    ],
)
def test_levels_are_planned_for_the_most_that_there_can_be(
    small: FakeModel, source: str, levels: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spark = small.spark.newSession()
    if "numbers" in source:
        folder = str(tmp_path_factory.mktemp("numbers"))
        spark.range(3).selectExpr("id", "string(id) AS s").write.parquet(folder, mode="overwrite")
        spark.read.parquet(folder).createOrReplaceTempView("numbers")
    frame = spark.sql(f"SELECT ai_agg(string(col1), 'What?') FROM {source}")
    plan = str(frame._jdf.queryExecution().optimizedPlan())
    assert plan.count("ArrowEvalPython") == 1 + levels


def test_columns_are_called_as_the_calls_are_written(small: FakeModel) -> None:
    calls = f"{AGG}, ai_agg(DISTINCT t, 'Why?'), ai_summarize_agg(t), ai_top_k(upper(t), 'bad', 2)"
    assert small.spark.sql(f"SELECT g, {calls} FROM r GROUP BY g").columns == [
        "g",
        "ai_agg(t, What is wrong?, max_tokens => 12)",
        "ai_agg(DISTINCT t, Why?)",
        "ai_summarize_agg(t)",
        "ai_top_k(upper(t), bad, 2)",
    ]


def test_without_its_rule_it_says_so(small: FakeModel) -> None:
    spark = small.spark
    spark.conf.set("spark.sql.optimizer.excludedRules", "spark_llm.EarlyRules")
    try:
        with pytest.raises(AnalysisException, match=r"switched off.*spark.sql.optimizer.excludedRules") as error:
            spark.sql(f"SELECT {AGG} FROM r").collect()
    finally:
        spark.conf.unset("spark.sql.optimizer.excludedRules")
    assert error.value.getCondition() == "LLM_AGGREGATE_NOT_PLANNED"
    assert str(error.value).startswith("[LLM_AGGREGATE_NOT_PLANNED] ai_agg() ")


def test_a_rule_that_fails_says_so(small: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> str:
        raise RuntimeError("broken")

    rule = importlib.import_module("spark_llm.optimizer.rules.llm_aggregates")  # the package has a function so called
    monkeypatch.setattr(rule, "reduced", fails)
    with pytest.raises(AnalysisException, match="RuntimeError: broken") as error:
        small.spark.sql(f"SELECT {AGG} FROM r").collect()
    assert error.value.getCondition() == "LLM_AGGREGATE_NOT_PLANNED"


def asked(model: FakeModel) -> set[tuple[str, ...]]:
    """The texts of each prompt of a first level, sorted."""
    return {tuple(sorted(listed(request.prompt))) for request in model.requests() if "\ntexts: " in request.prompt}


def test_beside_other_aggregates_with_filter_having_distinct_and_several_keys(small: FakeModel) -> None:
    query = f"""SELECT upper(g) AS u, count(*) AS rows, {AGG} AS a, sum(n) + 1 AS s, avg(length(t)) AS l,
                       {AGG.replace("(t", "(DISTINCT t")} FILTER (WHERE n < 2) AS first
                FROM few GROUP BY g, length(g)
                HAVING count(*) < 10 AND ({AGG} IS NOT NULL OR g = 'none') ORDER BY u NULLS FIRST"""
    rows = small.spark.sql(query).collect()
    assert [(row.u, row.rows, row.s, row.a is None, row["first"] is None) for row in rows] == [
        (None, 1, 1, False, False),
        ("FEW", 4, 7, False, False),
        ("NONE", 2, 2, True, True),
        ("ONE", 1, 1, False, False),
    ]
    assert rows[1].l == pytest.approx(24 / 3)
    assert rows[1].a != rows[1]["first"]
    assert rows[3].a == rows[3]["first"]  # the same texts
    assert asked(small) == {tuple(sorted(lines_of(GROUPS[group]))) for group in FEW if group != "none"} | {("late",)}


@pytest.mark.parametrize(("sets", "beside"), [("ROLLUP(g, n % 2)", ""), ("CUBE(g, n % 2)", ", count(*) AS rows")])
def test_rollup_and_cube(small: FakeModel, sets: str, beside: str) -> None:
    query = f"SELECT g, n % 2 AS odd, {AGG} AS a{beside} FROM few WHERE g IS NOT NULL GROUP BY {sets}"
    found = {(row.g, row.odd): row.a for row in small.spark.sql(query).collect()}
    rows = [(group, n % 2, text) for group in FEW if group for n, text in enumerate(GROUPS[group])]
    keys = {(g, odd) for group, part, _ in rows for g in (group, None) for odd in (part, None)}
    groups = {
        key: [text for *of, text in rows if all(k in (None, v) for k, v in zip(key, of, strict=True))] for key in keys
    }
    if "ROLLUP" in sets:
        groups = {key: texts for key, texts in groups.items() if key[0] or key == (None, None)}
    assert {key: answer is None for key, answer in found.items()} == {
        key: not lines_of(texts) for key, texts in groups.items()
    }
    assert asked(small) == {tuple(sorted(lines)) for lines in map(lines_of, groups.values()) if lines}


def test_without_keys_over_nothing_and_in_a_subquery(small: FakeModel) -> None:
    spark = small.spark
    assert spark.sql(f"SELECT {AGG} AS a FROM few WHERE n > 1000").collect() == [Row(a=None)]
    assert spark.sql(f"SELECT {AGG} AS a, count(*) AS n FROM few WHERE n > 1000").collect() == [Row(a=None, n=0)]
    assert spark.sql(f"SELECT g, {AGG} AS a FROM few WHERE n > 1000 GROUP BY g").collect() == []
    assert small.requests() == []
    query = f"""SELECT DISTINCT g, (SELECT {AGG} FROM few AS i WHERE i.g = o.g AND n < 9) AS a,
                       (SELECT {AGG} FROM few WHERE g = 'few') AS b FROM few AS o WHERE g IN ('few', 'none')"""
    [few, none] = sorted(spark.sql(query).collect())
    assert few.a == few.b == none.b
    assert few.a is not None
    assert none.a is None


@pytest.mark.slow
def test_columns_and_explain(small: FakeModel) -> None:
    frame = small.spark.table("r").where("g = 'few'").groupBy("g")
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
    spark.sql("SELECT * FROM r UNION ALL SELECT 'many', 'fail', 0").createOrReplaceTempView("failing")
    query = f"SELECT g, {AGG} AS a FROM failing WHERE g IN ('many', 'few') GROUP BY g"
    found = {row.g: row.a for row in spark.sql(query).collect()}
    assert found["many"] is None
    assert found["few"] is not None
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
