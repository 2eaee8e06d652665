"""SemanticJoin: joins on a call of every kind give what the same join on an ordinary condition gives."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_counting import FakeModel
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plans import assert_idempotent, optimized, settings_of_a_test, spark_jobs, specs, text
from pyspark import cloudpickle
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import config
from spark_llm.call import GroupSpec
from spark_llm.functions import registry
from spark_llm.functions.registry import Registry
from spark_llm.optimizer import rules
from spark_llm.udf import pandas_function

pytestmark = pytest.mark.spark

cloudpickle.register_pickle_by_value(__import__(__name__))


def fake_thirds_udf(folder: str, calls: int) -> Any:
    """Stands in for the real UDF: says yes where the two fields' sum is a multiple of 3, NULL where one is NULL, and
    writes down what it was asked: all rows that it gets."""

    def answers(is_masked: bool, columns: list[pd.Series]) -> pd.Series:
        found: list[str | None] = []
        with (Path(folder) / uuid.uuid4().hex).open("w") as file:
            for row in zip(*columns, strict=True):
                one, other = (None if pd.isna(value) else int(value) for value in row[:2])
                if is_masked and row[-1] is not True:
                    found.append("yes")  # what a mask hides shows if somebody looks at it
                    continue
                file.write(json.dumps([one, other]) + "\n")
                found.append(None if one is None or other is None else "yes" if (one + other) % 3 == 0 else "no")
        return pd.Series(found, dtype=object)

    def fake_thirds(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[Any]:
        for spec, *columns in batches:
            if not calls:
                yield answers('"masked":true' in spec[0], columns[1:])
            elif len(spec):
                group = GroupSpec.decode(spec[0])
                parts = [[columns[number] for number in numbers[1:]] for numbers in group.arguments]
                found = [answers(call.masked, part) for call, part in zip(group.calls, parts, strict=True)]
                yield pd.DataFrame({f"a{call}": column for call, column in enumerate(found)})

    return pandas_function(fake_thirds, calls)


@dataclass(frozen=True)
class Thirds:
    """A session whose calls know the multiples of 3, with only the rules at hand."""

    spark: SparkSession
    folder: Path

    def asked(self) -> list[list[int | None]]:
        """The calls since the last time."""
        lines = [line for file in self.folder.iterdir() for line in file.read_text().splitlines()]
        for file in self.folder.iterdir():
            file.unlink()
        return [json.loads(line) for line in lines]

    def bag(self, query: str) -> Counter[tuple[Any, ...]]:
        return Counter(map(tuple, self.spark.sql(query).collect()))


@pytest.fixture(scope="module")
def session_of_thirds(spark: SparkSession) -> SparkSession:
    """One for all tests, so that what their joins have in common is counted once."""
    session = spark_llm.enable(spark.newSession())
    for key in config.entries():
        if key.startswith("spark.llm.optimizer.") and key.endswith(".enabled") and key.count(".") == 4:
            session.conf.set(key, key.split(".")[3] in ("semanticJoin", "maskConditionalCalls", "statistics"))
    session.conf.set("spark.llm.optimizer.statistics.timeout", "300s")
    view(session, "all_l", L, LEFT)
    view(session, "all_r", R, RIGHT)
    return session


@pytest.fixture
def thirds(session_of_thirds: SparkSession, tmp_path: Path) -> Iterator[Thirds]:
    session = session_of_thirds
    make = functools.cache(functools.partial(fake_thirds_udf, str(tmp_path)))
    with Registry.of(session).using(session, lambda tables, calls=0: make(calls)), settings_of_a_test(session):
        for name in ("l", "r"):
            session.table(f"all_{name}").createOrReplaceTempView(name)
        yield Thirds(session, tmp_path)


L, R = "k INT, a INT, u STRING NOT NULL", "j INT, b INT, v STRING NOT NULL"
# Equal rows on both sides, keys and values that are NULL, keys without a partner.
LEFT = [(1, 1, "x"), (1, 1, "x"), (2, 2, "y"), (3, 2, "y"), (None, 4, "z"), (4, None, "z"), (2, 1, "y")]
RIGHT = [(1, 2, "m"), (1, 2, "m"), (1, 5, "m"), (2, 1, "n"), (2, 2, "n"), (None, 2, "o"), (9, 1, "o"), (4, 2, "o")]


def view(session: SparkSession, name: str, schema: str, rows: list[tuple[Any, ...]]) -> None:
    session.createDataFrame(rows, schema).repartition(2).createOrReplaceTempView(name)


CALL, PLAIN = "llm('Is it?', a, b) = 'yes'", "coalesce((a + b) % 3 = 0, false)"
JOINS = ("INNER", "LEFT", "RIGHT", "FULL", "LEFT SEMI", "LEFT ANTI")
SOME_JOINS = [  # each time; all of them by make test-all
    kind if kind in ("INNER", "LEFT", "LEFT ANTI") else pytest.param(kind, marks=pytest.mark.slow) for kind in JOINS
]
KINDS = {
    **{kind: f"SELECT * FROM l {kind} JOIN r ON {{}}" for kind in JOINS},
    "EXISTS": "SELECT * FROM l WHERE EXISTS (SELECT 1 FROM r WHERE {})",
    "NOT EXISTS": "SELECT * FROM l WHERE NOT EXISTS (SELECT 1 FROM r WHERE {})",
    "OR EXISTS": "SELECT * FROM l WHERE u = 'z' OR EXISTS (SELECT 1 FROM r WHERE {})",
    "IN": "SELECT * FROM l WHERE k IN (SELECT j FROM r WHERE {})",
    "NOT IN": "SELECT * FROM l WHERE k NOT IN (SELECT j FROM r WHERE j IS NOT NULL AND {})",
}


# Those that give rows of a side whose other side is empty.
KEEPING = ("LEFT", "FULL", "LEFT ANTI", "NOT EXISTS")


@pytest.mark.parametrize("kind", KINDS)
def test_a_join_is_what_it_is_with_an_ordinary_condition(thirds: Thirds, kind: str) -> None:
    for cheap in ("", "k = j AND u <> 'y' AND v < 'n' AND "):
        query = KINDS[kind]
        assert thirds.bag(query.format(cheap + CALL)) == thirds.bag(query.format(cheap + PLAIN)), cheap
    if kind not in KEEPING:
        return
    for name, schema in (("l", L), ("r", R)):
        table = thirds.spark.table(name)
        view(thirds.spark, name, schema, [])
        assert thirds.bag(KINDS[kind].format(CALL)) == thirds.bag(KINDS[kind].format(PLAIN)), f"{name} is empty"
        table.createOrReplaceTempView(name)


@pytest.mark.slow
def test_random_tables(thirds: Thirds) -> None:
    small = st.one_of(st.none(), st.integers(0, 3))
    tables = st.lists(st.tuples(small, small, st.sampled_from("xyz")), max_size=6)

    @settings(
        max_examples=2,
        derandomize=True,
        deadline=None,
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(tables, tables, st.sampled_from(["k = j AND ", "", "a > b OR "]), st.sampled_from(["{}", "(v = 'x' OR {})"]))
    def check(left: list[Any], right: list[Any], cheap: str, form: str) -> None:
        view(thirds.spark, "l", L, left)
        view(thirds.spark, "r", R, right)
        for kind in JOINS:
            query = KINDS[kind]
            found, expected = (thirds.bag(query.format(cheap + form.format(each))) for each in (CALL, PLAIN))
            assert found == expected, (kind, cheap, form)

    check()


@pytest.mark.parametrize("kind", SOME_JOINS)
def test_only_pairs_that_cheap_conditions_leave_are_asked(thirds: Thirds, kind: str) -> None:
    pairs = thirds.bag("SELECT a, b FROM l JOIN r ON k = j AND v < 'o'")
    thirds.asked()
    thirds.spark.sql(f"SELECT * FROM l {kind} JOIN r ON k = j AND v < 'o' AND {CALL}").collect()
    assert Counter(map(tuple, thirds.asked())) == pairs


def test_conditions_on_a_pair_are_asked_one_after_the_other(thirds: Thirds) -> None:
    """The second call of the condition is for pairs that pass the first, and what is cheap spares both."""
    condition = f"k = j AND {CALL} AND (v = 'm' OR llm('Really?', b, a) = 'yes')"
    passing = thirds.bag(f"SELECT a, b, v FROM l JOIN r ON k = j WHERE {PLAIN}")
    thirds.asked()
    found = thirds.bag(f"SELECT * FROM l LEFT JOIN r ON {condition}")
    asked = thirds.asked()
    second = sum(count for (_, _, v), count in passing.items() if v != "m")
    assert len(asked) == sum(thirds.bag("SELECT a, b FROM l JOIN r ON k = j").values()) + second
    assert found == thirds.bag(f"SELECT * FROM l LEFT JOIN r ON k = j AND {PLAIN}")


@pytest.mark.slow
def test_each_side_is_read_once_and_the_plan_is_final(echo: SparkSession) -> None:
    view(echo, "l", "k INT, a INT, u STRING", LEFT)
    view(echo, "r", "j INT, b INT, v STRING", RIGHT)
    for kind in JOINS:
        df = echo.sql(f"SELECT * FROM l {kind} JOIN r ON k = j AND {CALL}")
        assert text(df).count("LogicalRDD") == 2, kind
        assert len(specs(df)) == 1, kind
        assert_idempotent(df)


@pytest.mark.slow
def test_all_rules_together(model: FakeModel) -> None:
    """The pairs of an inner join, which Spark knows, say what the other joins are."""
    spark = model.spark
    left = [(number, number % 3, f"left {number % 4}") for number in range(9)]
    right = [(number, number % 4, f"right {number % 3}") for number in range(8)]
    view(spark, "l", "x INT, k INT, a STRING", left)
    view(spark, "r", "y INT, j INT, b STRING", right)

    def found(kind: str) -> Counter[tuple[Any, ...]]:
        columns = "x" if kind in ("LEFT SEMI", "LEFT ANTI") else "x, y"
        condition = "k = j AND llm('Do they match?', a, b) < '8'"
        return Counter(map(tuple, spark.sql(f"SELECT {columns} FROM l {kind} JOIN r ON {condition}").collect()))

    pairs = found("INNER")
    assert pairs
    calls = model.engine_calls()
    assert calls == len({(a, b) for _, k, a in left for _, j, b in right if k == j})
    lefts, rights = {x for x, _ in pairs}, {y for _, y in pairs}
    lonely_left = Counter((x, None) for x, *_ in left if x not in lefts)
    lonely_right = Counter((None, y) for y, *_ in right if y not in rights)
    expected = {
        "LEFT": pairs + lonely_left,
        "RIGHT": pairs + lonely_right,
        "FULL": pairs + lonely_left + lonely_right,
        "LEFT SEMI": Counter((x,) for x in lefts),
        "LEFT ANTI": Counter((x,) for x, _ in lonely_left),
    }
    for kind, rows in expected.items():
        model.forget()
        assert found(kind) == rows, kind
        if kind in ("LEFT SEMI", "LEFT ANTI"):
            assert model.engine_calls() <= calls, kind
        else:
            assert model.engine_calls() == calls, kind


def test_a_call_on_one_side_stays_where_spark_puts_it(thirds: Thirds) -> None:
    found = thirds.bag("SELECT * FROM l LEFT JOIN r ON k = j AND llm('p', a, k) = 'yes'")
    assert found == thirds.bag("SELECT * FROM l LEFT JOIN r ON k = j AND coalesce((a + k) % 3 = 0, false)")
    assert "Window" not in text(thirds.spark.sql("SELECT * FROM l LEFT JOIN r ON k = j AND llm('p', a, k) = 'yes'"))


# One match of a left row is enough

UNTIL = {
    "SEMI": "SELECT x FROM l LEFT SEMI JOIN r ON {}",
    "ANTI": "SELECT x FROM l LEFT ANTI JOIN r ON {}",
    "EXISTS": "SELECT x FROM l WHERE EXISTS (SELECT 1 FROM r WHERE {})",
    "NOT EXISTS": "SELECT x FROM l WHERE NOT EXISTS (SELECT 1 FROM r WHERE {})",
    "OR EXISTS": "SELECT x FROM l WHERE a IS NULL OR EXISTS (SELECT 1 FROM r WHERE {})",
    "IN": "SELECT x FROM l WHERE k IN (SELECT j FROM r WHERE {})",
    "NOT IN": "SELECT x FROM l WHERE k NOT IN (SELECT j FROM r WHERE {})",
}
PAIRS = "llm('Do they match?', a, b) < '4'"  # a quarter of the hashes
# Each left row has 24 pairs of distinct texts, two have no text; the keys are NULL here and there.
LEFTS = [(n, None if n == 5 else n % 2, None if n in (3, 8) else f"left {n}") for n in range(12)]
RIGHTS = [(n, None if n == 7 else n % 2, f"right {n}") for n in range(24)]


def pair_tables(spark: SparkSession) -> None:
    view(spark, "l", "x INT, k INT, a STRING", LEFTS)
    view(spark, "r", "y INT, j INT, b STRING", RIGHTS)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("SEMI", "ANTI", "NOT IN") else pytest.param(kind, marks=pytest.mark.slow) for kind in UNTIL],
)
def test_no_pair_of_a_left_row_is_asked_after_a_match(unordered_model: FakeModel, kind: str) -> None:
    """Of each left row at most 2 p - 1 pairs, if the p-th of them matches first; the rows are those of asking all."""
    spark = unordered_model.spark
    pair_tables(spark)
    query = UNTIL[kind].format(PAIRS)
    found = Counter(map(tuple, spark.sql(query).collect()))
    asked = unordered_model.streams()
    with all_pairs():
        unordered_model.forget()
        expected = Counter(map(tuple, spark.sql(query).collect()))
        every = {request.cells for request in unordered_model.requests()}
        yes = matching(spark)
    assert found == expected
    assert len({request.cells for stream in asked for request in stream}) < len(every) / 2
    for stream in asked:
        by_left: dict[str, list[bool]] = {}
        for request in stream:
            cells = dict(request.cells)
            if cells["a"] != "null":
                by_left.setdefault(cells["a"], []).append((cells["a"], cells["b"]) in yes)
        for left, hits in by_left.items():
            others = {cells for cells in every if dict(cells)["a"] == left}
            if True in hits:
                assert len(hits) <= 2 * (hits.index(True) + 1) - 1
            else:
                assert len(hits) == len(others)


def matching(spark: SparkSession) -> set[tuple[str, str]]:
    """The texts of all pairs that match."""
    return set(map(tuple, spark.sql(f"SELECT a, b FROM l JOIN r ON {PAIRS}").collect()))


@contextlib.contextmanager
def all_pairs() -> Iterator[None]:
    """All pairs are asked: no rule looks for the joins of which one match is enough."""
    with pytest.MonkeyPatch.context() as patch:
        kept = [rule for rule in rules.RULES if rule.apply.__name__ != "first_match"]
        patch.setattr(registry, "RULES", tuple(kept))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("window", "partitions"), [(5, 1), (50, 3), (4096, 40)])
def test_pairs_of_a_left_row_in_several_windows(unordered_model: FakeModel, window: int, partitions: int) -> None:
    spark = unordered_model.spark
    pair_tables(spark)
    spark.conf.set("spark.llm.windowRows", window)
    spark.conf.set("spark.llm.optimizer.reorderRows.partitions", partitions)
    for kind in ("SEMI", "NOT EXISTS"):
        query = UNTIL[kind].format(PAIRS)
        found = Counter(map(tuple, spark.sql(query).collect()))
        calls = unordered_model.engine_calls()
        with all_pairs():
            unordered_model.forget()
            assert found == Counter(map(tuple, spark.sql(query).collect()))
        assert calls < unordered_model.engine_calls() / 2
        unordered_model.forget()


def test_pairs_that_the_user_spread_over_tasks_are_still_right(unordered_model: FakeModel) -> None:
    """No exchange gathers a left row's pairs where rows are not to be moved: less is saved, the rows are the same."""
    spark = unordered_model.spark
    pair_tables(spark)
    spark.conf.set("spark.llm.optimizer.reorderRows.enabled", "false")
    for kind in ("SEMI", "ANTI"):
        query = UNTIL[kind].format(PAIRS)
        found = Counter(map(tuple, spark.sql(query).collect()))
        with all_pairs():
            assert found == Counter(map(tuple, spark.sql(query).collect()))


@pytest.mark.slow
def test_several_calls_stop_at_the_first_match_of_all(unordered_model: FakeModel) -> None:
    spark = unordered_model.spark
    pair_tables(spark)
    both = f"{PAIRS} AND llm('Really?', a, b) < '8'"
    for kind in ("SEMI", "ANTI"):
        unordered_model.forget()
        found = Counter(map(tuple, spark.sql(UNTIL[kind].format(both)).collect()))
        calls = unordered_model.engine_calls()
        with all_pairs():
            unordered_model.forget()
            assert found == Counter(map(tuple, spark.sql(UNTIL[kind].format(both)).collect())), kind
        assert calls < unordered_model.engine_calls() / 1.5, kind
        df = spark.sql(UNTIL[kind].format(both))
        assert len(specs(df)) == 2
        assert optimized(df).toString().count('"pair":') == 1
        assert_idempotent(df)


def test_a_condition_that_a_task_cannot_evaluate_asks_all_pairs(unordered_model: FakeModel) -> None:
    spark = unordered_model.spark
    pair_tables(spark)
    spark.sql("SELECT x FROM l LEFT SEMI JOIN r ON reverse(llm('Do they match?', a, b)) < '4'").collect()
    texts = sum(a is not None for _, _, a in LEFTS)
    # A pair without the left text asks about the right one alone.
    assert unordered_model.engine_calls() == texts * len(RIGHTS) + len(RIGHTS)
    df = spark.sql(f"SELECT * FROM l LEFT JOIN r ON {PAIRS}")
    assert '"pair"' not in text(df)  # each partner of a row comes out


@pytest.mark.slow
def test_the_plan_with_pairs_is_final(unordered_model: FakeModel) -> None:
    pair_tables(unordered_model.spark)
    for kind in ("SEMI", "NOT EXISTS"):
        df = unordered_model.spark.sql(UNTIL[kind].format(PAIRS))
        assert '"pair":' in optimized(df).toString()
        assert_idempotent(df)


# Too many pairs

CROSS = f"SELECT * FROM l JOIN r ON {CALL}"


@pytest.mark.parametrize("kind", SOME_JOINS)
def test_too_many_pairs_are_refused_before_the_first_call(thirds: Thirds, kind: str) -> None:
    pairs = len(LEFT) * len(RIGHT)
    query = f"SELECT * FROM l {kind} JOIN r ON {CALL}"
    thirds.spark.conf.set("spark.llm.join.maxPairs", pairs - 1)
    with pytest.raises(AnalysisException, match="LLM_TOO_MANY_PAIRS") as raised:
        thirds.spark.sql(query).collect()
    assert f"about {pairs} pairs" in str(raised.value)
    assert thirds.asked() == []
    thirds.spark.conf.set("spark.llm.join.maxPairs", pairs)
    thirds.spark.sql(query).collect()
    assert len(thirds.asked()) == pairs


def test_pairs_that_cheap_conditions_drop_do_not_count(thirds: Thirds) -> None:
    equal = sum(thirds.bag("SELECT 1 FROM l JOIN r ON k = j").values())
    for kind in ("INNER", "LEFT"):
        query = f"SELECT * FROM l {kind} JOIN r ON k = j AND {CALL}"
        thirds.spark.conf.set("spark.llm.join.maxPairs", equal)
        thirds.spark.sql(query).collect()
        thirds.spark.conf.set("spark.llm.join.maxPairs", equal - 1)
        with pytest.raises(AnalysisException, match=f"about {equal} pairs"):
            thirds.spark.sql(query).collect()


def test_pairs_are_counted_once_and_never_for_explain(thirds: Thirds) -> None:
    view(thirds.spark, "l", L, LEFT)  # of which nobody has counted the pairs before
    thirds.spark.conf.set("spark.llm.join.maxPairs", 3)
    before = spark_jobs(thirds.spark)
    assert "ArrowEvalPython" in thirds.spark.sql(f"EXPLAIN EXTENDED {CROSS}").collect()[0][0]
    assert spark_jobs(thirds.spark) == before
    with pytest.raises(AnalysisException, match="LLM_TOO_MANY_PAIRS"):
        optimized(thirds.spark.sql(CROSS))
    counted = spark_jobs(thirds.spark)
    assert counted > before
    with pytest.raises(AnalysisException, match="LLM_TOO_MANY_PAIRS"):
        optimized(thirds.spark.sql(CROSS))
    assert spark_jobs(thirds.spark) == counted


def test_joins_that_no_call_decides_have_no_limit(thirds: Thirds) -> None:
    thirds.spark.conf.set("spark.llm.join.maxPairs", 3)
    thirds.spark.sql("SELECT llm('p', a, b) FROM l CROSS JOIN r").collect()
    thirds.spark.sql("SELECT * FROM l JOIN r ON k = j WHERE llm('p', a, k) = 'yes'").collect()
    thirds.spark.conf.set("spark.llm.join.maxPairs", 0)
    thirds.spark.sql(CROSS).collect()
