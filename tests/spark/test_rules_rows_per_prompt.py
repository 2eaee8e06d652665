"""Several right rows in one prompt: the rows of a join are those of a pair a prompt, with fewer prompts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_counting import FakeModel, fake_model, numbered
from plans import assert_idempotent, specs
from pyspark import cloudpickle
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

import spark_llm

pytestmark = pytest.mark.spark

cloudpickle.register_pickle_by_value(__import__(__name__))

K = 4
# Left rows 0 and 1 have equal texts, 5 has no key; right row 7 has none, 8 repeats a text.
LEFT = [(n, None if n == 5 else n % 2, f"left {max(n, 1)}") for n in range(6)]
RIGHT = [(n, None if n == 7 else n % 2, "right 6" if n == 8 else f"right {n}") for n in range(13)]
CALL = "llm('Do they match?', a, b) = 'yes'"
KINDS = {
    **{
        f"{kind} JOIN": f"l {kind} JOIN r ON {{}}"
        for kind in ("INNER", "LEFT", "RIGHT", "FULL", "LEFT SEMI", "LEFT ANTI")
    },
    "EXISTS": "l WHERE EXISTS (SELECT 1 FROM r WHERE {})",
    "NOT EXISTS": "l WHERE NOT EXISTS (SELECT 1 FROM r WHERE {})",
    "IN": "l WHERE k IN (SELECT j FROM r WHERE {})",
    "NOT IN": "l WHERE k NOT IN (SELECT j FROM r WHERE j IS NOT NULL AND {})",
}
ALL_PAIRS = ("INNER JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN")


def says(message: str) -> str:
    """An answer that depends on the lines of a prompt alone, yes for about a third."""
    lines = "".join(sorted(message.splitlines()))
    return "yes" if hashlib.sha1(lines.encode()).digest()[0] % 3 == 0 else "no"


def tables(spark: SparkSession) -> None:
    for name, schema, rows in (("l", "x INT, k INT, a STRING", LEFT), ("r", "y INT, j INT, b STRING", RIGHT)):
        spark.createDataFrame(rows, schema).repartition(2).createOrReplaceTempView(name)


def faulty(answers: Any) -> str:
    """Numbers its lines, but forgets the second and has the third twice."""
    lines = numbered(answers).splitlines()
    return "\n".join([*lines[:1], *lines[2:3], *lines[2:]])


Model = Callable[..., FakeModel]


@pytest.fixture
def open_model(spark: SparkSession, tmp_path: Path) -> Iterator[Model]:
    """A model with the tables, that tells its answers as it is told."""
    contexts = []

    def make(tell: Callable[[Any], str] = numbered, rows: int = K) -> FakeModel:
        (folder := tmp_path / f"{len(contexts)}").mkdir()
        context = fake_model(spark, folder, reads_order=False, answers=says, tell=tell)
        contexts.append(context)
        found = context.__enter__()
        tables(found.spark)
        found.spark.conf.set("spark.llm.join.rowsPerPrompt", rows)
        return found

    yield make
    for context in reversed(contexts):
        context.__exit__(None, None, None)


def bag(model: FakeModel, query: str) -> Counter[tuple[Any, ...]]:
    return Counter(map(tuple, model.spark.sql(f"SELECT * FROM {query}").collect()))


def with_one_row(model: FakeModel, query: str) -> Counter[tuple[Any, ...]]:
    """The rows of the query with a pair a prompt; calls before are forgotten."""
    model.forget()
    model.spark.conf.set("spark.llm.join.rowsPerPrompt", 1)
    try:
        return bag(model, query)
    finally:
        model.spark.conf.set("spark.llm.join.rowsPerPrompt", K)


def least_prompts(condition: Callable[[Any, Any], bool]) -> int:
    """Of pairs that meet the condition: a prompt for each K different right texts of each left text."""
    texts: dict[str, set[str]] = {}
    for _, k, a in LEFT:
        for _, j, b in RIGHT:
            if condition(k, j):
                texts.setdefault(a, set()).add(b)
    return sum(-(-len(rights) // K) for rights in texts.values())


def report(model: FakeModel) -> Any:
    found = spark_llm.last_report(model.spark)
    assert found is not None
    counted = found.calls + found.shared + found.duplicates + found.stored + found.skipped + found.nulls + found.failed
    assert found.rows + found.asked_again == counted + found.over_budget
    return found


QUICK = ("INNER JOIN", "LEFT JOIN", "LEFT ANTI JOIN")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_rows_are_those_of_a_pair_a_prompt(open_model: Model, kind: str) -> None:
    model = open_model()
    query = KINDS[kind].format(f"k = j AND {CALL}" if "IN" not in kind.split() else CALL)
    found = bag(model, query)
    calls = len(model.requests())
    asked = report(model)
    assert any(len(request.pairs) > 1 for request in model.requests())
    assert all(len(request.pairs) <= K for request in model.requests())
    assert asked.calls == calls
    assert asked.asked_again == 0
    assert found == with_one_row(model, query)
    assert len(found) > 0
    assert calls < model.engine_calls()
    if kind in ALL_PAIRS:
        assert calls == least_prompts(lambda k, j: k is not None and k == j)


def test_what_is_not_clear_is_asked_alone(open_model: Model) -> None:
    model = open_model(faulty)
    for kind in ("INNER JOIN", "LEFT ANTI JOIN"):
        query = KINDS[kind].format(f"k = j AND {CALL}")
        model.forget()
        found = bag(model, query)
        prompts = model.requests()
        asked = report(model)
        assert asked.asked_again == sum(min(2, len(r.pairs) - 1) for r in prompts if len(r.pairs) > 1) > 0
        assert f"{asked.asked_again} asked again alone" in str(asked)
        assert asked.calls == len(prompts)
        assert found == with_one_row(model, query)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "I cannot tell.", "0: yes\n1: yes\n2: yes\n3: yes", "yes\nno\nno\nno"])
def test_an_answer_without_any_clear_line_loses_nothing(open_model: Model, text: str) -> None:
    model = open_model(lambda answers: text)
    query = KINDS["LEFT JOIN"].format(f"k = j AND {CALL}")
    found = bag(model, query)
    asked = report(model)
    assert asked.asked_again == sum(len(r.pairs) for r in model.requests() if len(r.pairs) > 1)
    assert found == with_one_row(model, query)


def test_a_prompt_that_fails_is_split_until_its_rows_stand_alone(open_model: Model) -> None:
    """The fake fails every message that has a certain text in it."""
    model = open_model()
    model.spark.createDataFrame([*RIGHT, (20, 0, "fail")], "y INT, j INT, b STRING").createOrReplaceTempView("r")
    query = KINDS["LEFT JOIN"].format(f"k = j AND {CALL}")
    found = bag(model, query)
    asked = report(model)
    assert asked.failed == len({a for _, k, a in LEFT if k == 0})
    assert asked.asked_again == 0
    assert found == with_one_row(model, query)


def test_only_where_prompts_may_change(open_model: Model) -> None:
    model = open_model()
    query = KINDS["INNER JOIN"].format(f"k = j AND {CALL}")
    found = bag(model, query)
    ordered = query.replace("a, b)", "a, b, order => 'as_written')")
    assert bag(model, ordered) == found
    model.forget()
    bag(model, ordered)
    assert all(len(request.pairs) == 1 for request in model.requests())
    model.forget()
    model.spark.conf.set("spark.llm.optimizer.mayChangePrompts", "false")
    assert bag(model, query) == found
    assert all(len(request.pairs) == 1 for request in model.requests())


def test_only_pairs_of_a_join_on_the_call_share_prompts(open_model: Model) -> None:
    model = open_model()
    for query in (
        f"l WHERE {CALL.replace('a, b', 'a')}",
        f"l JOIN r ON k = j AND {CALL.replace('a, b', 'a')}",
        "(SELECT a, b, llm('Do they match?', a, b) AS m FROM l JOIN r ON k = j)",
    ):
        bag(model, query)
    assert all(len(request.pairs) == 1 for request in model.requests())


@pytest.mark.slow
def test_several_calls_and_a_computed_field(open_model: Model) -> None:
    model = open_model()
    query = KINDS["LEFT JOIN"].format(f"k = j AND {CALL} AND llm('Really?', upper(a), b, y) = 'yes'")
    found = bag(model, query)
    shared = {request.pairs[0][0] for request in model.requests() if len(request.pairs) > 1}
    assert len(shared) == 2
    assert found == with_one_row(model, query)


def test_a_budget_counts_prompts(open_model: Model) -> None:
    model = open_model()
    query = KINDS["INNER JOIN"].format(f"k = j AND {CALL}")
    prompts = least_prompts(lambda k, j: k is not None and k == j)
    model.spark.conf.set("spark.llm.budget.maxCalls", prompts)
    bag(model, query)
    assert report(model).over_budget == 0
    model.spark.conf.set("spark.llm.budget.maxCalls", prompts - 1)
    with pytest.raises(PySparkException, match="LLM_BUDGET_EXCEEDED"):
        bag(model, query)
    model.spark.conf.set("spark.llm.budget.onExceeded", "partial")
    model.forget()
    bag(model, query)
    asked = report(model)
    assert asked.calls == prompts - 1
    assert 0 < asked.over_budget <= 3 * K  # left rows may have equal texts


def test_explain_knows_the_prompts(open_model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    model = open_model()
    df = model.spark.sql(f"SELECT * FROM {KINDS['INNER JOIN'].format(f'k = j AND {CALL}')}")
    found = spark_llm.explain(df, mode="analyze")
    [call] = found.calls
    assert f"up to {K} right rows share a prompt" in capsys.readouterr().out
    assert call.actual is not None
    prompts = least_prompts(lambda k, j: k is not None and k == j)
    assert call.actual.calls == prompts
    assert call.estimate.calls.value == prompts
    assert call.estimate.output_tokens.value == prompts * K * (64 + 6)
    model.spark.conf.set("spark.llm.optimizer.mayChangePrompts", "false")
    spark_llm.explain(model.spark.sql(f"SELECT * FROM {KINDS['INNER JOIN'].format(f'k = j AND {CALL}')}"))
    assert "right rows share a prompt" not in capsys.readouterr().out


def test_the_plan_with_the_left_fields_in_it_is_final(open_model: Model) -> None:
    model = open_model()
    for kind in ("INNER JOIN", "LEFT JOIN", "LEFT SEMI JOIN"):
        df = model.spark.sql(f"SELECT * FROM {KINDS[kind].format(f'k = j AND {CALL}')}")
        assert '"rows":4' in str(specs(df)) or "rows=4" in str(specs(df))
        assert_idempotent(df)


@pytest.mark.parametrize("value", ["0", "65", "many"])
def test_other_numbers_are_refused(open_model: Model, value: str) -> None:
    model = open_model()
    model.spark.conf.set("spark.llm.join.rowsPerPrompt", value)
    with pytest.raises(Exception, match=r"LLM_INVALID_CONFIG.*1 to 64"):
        model.spark.sql(f"SELECT * FROM {KINDS['INNER JOIN'].format(CALL)}").collect()
