"""ReorderRows: the plan that it makes, where it keeps out, that it knows its own work and never changes a result.

Its partitions and keys are in test_rules_partitioning.py.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from plans import assert_idempotent, exchanges, golden, rows, settings, settings_of_a_test, sorts, text
from pyspark.sql import SparkSession

from spark_llm.functions import registry
from spark_llm.optimizer.catalyst import runner

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def session(shared_echo: SparkSession) -> SparkSession:
    """The echo session with a table t(id, info, n) of which the optimizer knows nothing."""
    spark = shared_echo
    table = spark.range(40, numPartitions=2).selectExpr("id", "string(id % 4) AS info", "CAST(id % 3 AS INT) AS n")
    spark.createDataFrame(table.rdd, table.schema).createOrReplaceTempView("t")
    return spark


@pytest.fixture
def t(session: SparkSession) -> Iterator[SparkSession]:
    with settings_of_a_test(session):
        yield session


def test_rows_are_placed_by_the_first_key_and_sorted_by_all(t: SparkSession) -> None:
    df = t.sql("SELECT id, llm(info, max_tokens => 2, text => info || 'x', other => info) AS a FROM t")
    assert text(df) == golden(
        """
        Project [id, pythonUDF0 AS a]
        +- Project [id, info, pythonUDF0]
           +- ArrowEvalPython [llm(spec, info, _llm1, info)], [pythonUDF0], 204
              +- Sort [info ASC NULLS FIRST, _llm1 ASC NULLS FIRST], false
                 +- RepartitionByExpression [info], 2
                    +- Project [id, info, concat(info, x) AS _llm1]
                       +- Project [id, info]
                          +- LogicalRDD
        """
    )
    assert_idempotent(df)


def test_with_statistics_rows_go_to_ranges_of_equal_work(t: SparkSession) -> None:
    df = t.sql("SELECT id, llm('p', n => id % 3, text => concat('t', id % 9)) AS a FROM range(0, 200, 1, 3)")
    assert text(df) == golden(
        """
        Project [id, pythonUDF0 AS a]
        +- Project [id, pythonUDF0]
           +- ArrowEvalPython [llm(spec, p, _llm0, _llm1)], [pythonUDF0], 204
              +- Sort [_llm_place ASC NULLS FIRST], false
                 +- RepartitionByExpression [substring(_llm_place, 1, 4)], 2
                    +- ArrowEvalPython [llm_place(_llm0, _llm1)], [_llm_place], 204
                       +- Project [id, cast((id % 3) as string) AS _llm0, concat(t, cast((id % 9) as string)) AS _llm1]
                          +- Range (0, 200, step=1, splits=Some(3))
        """
    )
    assert rows(df)[0].order_why == "sorted in 2 ranges of equal work"
    assert_idempotent(df)


def test_constants_are_no_keys_and_columns_need_no_project(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', kind => 'film', info) AS a FROM t")
    assert text(df) == golden(
        """
        Project [pythonUDF0 AS a]
        +- ArrowEvalPython [llm(spec, p, film, info)], [pythonUDF0], 204
           +- Sort [info ASC NULLS FIRST], false
              +- RepartitionByExpression [info], 2
                 +- Project [info]
                    +- LogicalRDD
        """
    )
    assert sorts(t.sql("SELECT id, llm('p', b => info, a => string(info)) AS a FROM t")) == ["info ASC NULLS FIRST"]


def test_filter_and_projection_are_placed_each(t: SparkSession) -> None:
    df = t.sql("SELECT id, llm('p', info) AS a FROM t WHERE llm('q', n) = 'yes'")
    assert text(df) == golden(
        """
        Project [id, pythonUDF0 AS a]
        +- ArrowEvalPython [llm(spec, p, info)], [pythonUDF0], 204
           +- Sort [info ASC NULLS FIRST], false
              +- RepartitionByExpression [info], 2
                 +- Project [id, info]
                    +- Filter (pythonUDF0 = yes)
                       +- Project [id, info, n, pythonUDF0]
                          +- ArrowEvalPython [llm(spec, q, _llm0)], [pythonUDF0], 204
                             +- Sort [_llm0 ASC NULLS FIRST], false
                                +- RepartitionByExpression [_llm0], 2
                                   +- Project [id, info, n, cast(n as string) AS _llm0]
                                      +- LogicalRDD
        """
    )
    assert_idempotent(df)


SHARED = {
    "two questions": "SELECT llm('p', info, n) AS a, llm('q', info, n) AS b FROM t",
    "two questions, fields listed in another order": "SELECT llm('p', info, n) AS a, llm('q', n, info) AS b FROM t",
    "the same call in WHERE and SELECT": "SELECT id, llm('p', info, n) FROM t WHERE llm('p', info, n) LIKE '%1%'",
    "another question in WHERE": "SELECT id, llm('p', info, n) FROM t WHERE llm('q', info, n) LIKE '%1%'",
}


@pytest.mark.parametrize("query", SHARED.values(), ids=list(SHARED))
def test_calls_over_the_same_fields_are_placed_once(t: SparkSession, query: str) -> None:
    settings(t, reuseAnswers_enabled=False, fuseCalls_enabled=False)  # which would leave one node
    df = t.sql(query)
    assert len(sorts(df)) == len(exchanges(df)) == 1
    assert [plan.order_why for plan in rows(df)][1] == "as the call below has them"


def test_calls_over_other_fields_are_placed_each(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', info, n) AS a, llm('q', n) AS b FROM t")
    assert len(sorts(df)) == len(exchanges(df)) == 2
    settings(t, mayChangePrompts=False, fuseCalls_enabled=False)
    assert len(sorts(t.sql(SHARED["two questions, fields listed in another order"]))) == 2


APPLIES = {
    "a filter above": "SELECT a FROM (SELECT id, llm('p', info) AS a FROM t) WHERE a LIKE '%1%'",
    "ORDER BY above": "SELECT id, llm('p', info) AS a FROM t ORDER BY id",
    "ORDER BY ... LIMIT above": "SELECT id, llm('p', info) AS a FROM t ORDER BY a, id LIMIT 3",
    "GROUP BY ... LIMIT above": "SELECT llm('p', info) AS a, count(*) FROM t GROUP BY 1 LIMIT 10",
    "DISTINCT ... LIMIT above": "SELECT DISTINCT llm('p', info) AS a FROM t LIMIT 10",
    "a window with ORDER BY above": "SELECT rank() OVER (ORDER BY a) FROM (SELECT llm('p', info) AS a FROM t)",
    "row numbers from below": "SELECT i, llm('p', info) FROM (SELECT monotonically_increasing_id() AS i, info FROM t)",
    "a join above": "SELECT * FROM (SELECT id, llm('p', info) AS a FROM t) JOIN range(9) r USING (id)",
    "a join below": "SELECT llm('p', info), r.id FROM t JOIN (SELECT * FROM range(9) ORDER BY id DESC) r USING (id)",
    "an aggregate below": "SELECT llm('p', info, m) FROM (SELECT info, max(n) AS m FROM t GROUP BY info)",
    "a sorted aggregate below": "SELECT llm('p', info) FROM (SELECT info FROM (SELECT * FROM t SORT BY id) GROUP BY 1)",
    "a union": "SELECT llm('p', info) FROM t UNION ALL SELECT info FROM t",
    "INTERSECT": "SELECT llm('p', info) FROM t INTERSECT SELECT info FROM t",
    "sampling with a seed": "SELECT llm('p', info, temperature => 0.5, seed => 1) FROM t",
    "a scalar subquery": "SELECT id, (SELECT max(llm('p', info)) FROM t) FROM range(2)",
    "an IN subquery": "SELECT id FROM t WHERE string(id) IN (SELECT llm('p', info) FROM t)",
    "a sum of its lengths": "SELECT sum(length(llm('p', info))) FROM t",
    "a random filter, which goes below": "SELECT * FROM (SELECT llm('p', info) AS a FROM t) WHERE rand(1) < 0.5",
    "explode above": "SELECT explode(split(a, ' ')) FROM (SELECT llm('p', info) AS a FROM t)",
}


@pytest.mark.parametrize("query", APPLIES.values(), ids=list(APPLIES))
def test_applies(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    assert any(keys.startswith("info ASC") for keys in sorts(df)), text(df)
    assert exchanges(df)
    assert_idempotent(df)


KEEPS_OUT = {
    "LIMIT above": "SELECT id, llm('p', info) FROM t LIMIT 3",
    "OFFSET above": "SELECT id FROM t WHERE llm('p', info) > 'a' OFFSET 3",
    "LIMIT over a filter above": "SELECT * FROM (SELECT id, llm('p', info) AS a FROM t) WHERE a LIKE '%1%' LIMIT 3",
    "LIMIT over a join above": "SELECT * FROM (SELECT id, llm('p', info) FROM t) JOIN range(9) r USING (id) LIMIT 3",
    "LIMIT over a union above": "(SELECT llm('p', info) FROM t UNION ALL SELECT info FROM t) LIMIT 3",
    "ORDER BY over LIMIT above": "SELECT * FROM (SELECT llm('p', info) AS a FROM t LIMIT 3) ORDER BY a",
    "row numbers above": "SELECT monotonically_increasing_id(), llm('p', info) FROM t",
    "rand above": "SELECT rand(1), llm('p', info) FROM t",
    "partition ids above": "SELECT spark_partition_id(), a FROM (SELECT llm('p', info) AS a FROM t)",
    "first()": "SELECT first(llm('p', info)) FROM t",
    "any_value()": "SELECT n, any_value(llm('p', info)) FROM t GROUP BY n",
    "collect_list()": "SELECT n, collect_list(llm('p', info)) FROM t GROUP BY n",
    "listagg()": "SELECT listagg(llm('p', info)) FROM t",
    "a window without ORDER BY": "SELECT first_value(a) OVER (PARTITION BY n) FROM (SELECT n, llm('p', info) a FROM t)",
    "a sample above": "SELECT * FROM (SELECT llm('p', info) FROM t) TABLESAMPLE (10 PERCENT) REPEATABLE (1)",
    "ORDER BY below": "SELECT id, llm('p', info) FROM (SELECT * FROM t ORDER BY id)",
    "SORT BY below": "SELECT id, llm('p', info) FROM (SELECT * FROM t SORT BY id DESC)",
    "CLUSTER BY below": "SELECT id, llm('p', info) FROM (SELECT * FROM t CLUSTER BY id)",
    "ORDER BY ... LIMIT below": "SELECT id, llm('p', info) FROM (SELECT * FROM t ORDER BY id LIMIT 9)",
    "ORDER BY under a filter": "SELECT llm('p', info) FROM (SELECT * FROM t ORDER BY id) WHERE n = 1",
    "ORDER BY under explode": "SELECT llm('p', info) FROM (TABLE t ORDER BY id) LATERAL VIEW explode(array(1)) v",
    "ORDER BY under a coalesce": "SELECT /*+ COALESCE(1) */ id, llm('p', info) FROM (SELECT * FROM t ORDER BY id)",
}


@pytest.mark.parametrize("query", KEEPS_OUT.values(), ids=list(KEEPS_OUT))
def test_keeps_out_where_the_order_can_be_seen(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    reasons = {
        "as they come: they are sorted below",
        "as they come: their order can be seen above",
        "as they come: below a LIMIT",
    }
    assert rows(df)
    assert {plan.order_why for plan in rows(df)} <= reasons
    assert not any(plan.is_sorted for plan in rows(df))
    assert not any("info ASC" in keys for keys in sorts(df))
    assert all(keys.startswith("id") for keys, _ in exchanges(df))  # CLUSTER BY's own
    assert_idempotent(df)


NO_KEYS = {
    "a random argument": "SELECT llm('p', info, r => rand()) FROM t",
    "sampling without a seed": "SELECT llm('p', info, temperature => 0.5) FROM t",
    "constants alone": "SELECT llm('p', 'film') FROM t",
}


@pytest.mark.parametrize("query", NO_KEYS.values(), ids=list(NO_KEYS))
def test_keeps_out_where_nothing_repeats(t: SparkSession, query: str) -> None:
    df = t.sql(query)
    assert sorts(df) == exchanges(df) == []
    assert len(rows(df)) == 1
    assert_idempotent(df)


WRITES = {
    "INSERT OVERWRITE DIRECTORY": "INSERT OVERWRITE DIRECTORY '{}' USING parquet SELECT llm('p', info) AS a FROM t",
    "CREATE TABLE AS": "CREATE TABLE llm_made USING parquet LOCATION '{}' AS SELECT llm('p', info) AS a FROM t",
}


@pytest.mark.parametrize("statement", WRITES.values(), ids=list(WRITES))
def test_applies_below_commands(t: SparkSession, statement: str, tmp_path: Path) -> None:
    try:
        t.sql(statement.format(tmp_path / "out"))
    finally:
        t.sql("DROP TABLE IF EXISTS llm_made")
    files = [pq.read_table(file).column("a").to_pylist() for file in sorted((tmp_path / "out").glob("*.parquet"))]
    assert len(files) == 2
    assert not set(files[0]) & set(files[1])
    assert all(len(set(answers)) == len(list(itertools.groupby(answers))) for answers in files)


def test_keeps_out_where_user_code_sees_the_order(t: SparkSession) -> None:
    answers = t.sql("SELECT id, llm('p', info) AS a FROM t")
    assert sorts(answers.mapInPandas(lambda batches: batches, "id LONG, a STRING")) == []
    assert sorts(answers.dropDuplicates(["a"])) == []  # keeps the first id of each
    assert sorts(answers.sample(0.5, 1)) == []
    assert sorts(answers.select("a").distinct()) == ["info ASC NULLS FIRST"]


def test_keeps_out_over_a_sorted_cache(t: SparkSession) -> None:
    ordered = t.table("t").orderBy("id").cache()
    plain = t.table("t").select("id", "info").cache()
    try:
        ordered.createOrReplaceTempView("ordered")
        plain.createOrReplaceTempView("plain")
        assert sorts(t.sql("SELECT id, llm('p', info) FROM ordered")) == []
        assert sorts(t.sql("SELECT id, llm('p', info) FROM plain")) == ["info ASC NULLS FIRST"]
    finally:
        ordered.unpersist()
        plain.unpersist()


def test_keeps_out_of_streams(t: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a micro-batch is optimized on a thread of the JVM, which calls Python from there."""
    t.table("t").coalesce(1).write.json(str(tmp_path / "in"))
    asked: list[threading.Thread] = []

    def run_rules(plan: Any, *rest: Any) -> Any:
        asked.append(threading.current_thread())
        return runner.run_rules(plan, *rest)

    monkeypatch.setattr(registry, "run_rules", run_rules)
    stream = t.readStream.schema("info STRING, n INT").json(str(tmp_path / "in")).selectExpr("llm('p', n, info) AS a")
    query = stream.writeStream.format("memory").queryName("answers").trigger(availableNow=True).start()
    try:
        query.processAllAvailable()
        assert t.table("answers").count() == 40
        shown = query._jsq.explainInternal(False)
        assert "Sort" not in shown
        assert "Exchange" not in shown
        assert "fields_why" not in shown
        assert threading.main_thread() not in asked[-1:]
        assert asked
    finally:
        query.stop()


def test_settings_switch_it_off(t: SparkSession) -> None:
    query = "SELECT llm('p', info) FROM t"
    for key in ("spark.llm.optimizer.enabled", "spark.llm.optimizer.reorderRows.enabled"):
        t.sql(f"SET {key} = false")
        assert sorts(t.sql(query)) == exchanges(t.sql(query)) == []
        t.sql(f"RESET {key}")
        assert sorts(t.sql(query)) == ["info ASC NULLS FIRST"]


def test_results_are_the_same_bag(t: SparkSession) -> None:
    shapes = ("a filter above", "a window with ORDER BY above", "a join below")
    for query in map(APPLIES.__getitem__, shapes):
        settings(t, enabled=True)
        ordered = t.sql(query).collect()
        settings(t, enabled=False)
        assert Counter(map(answer, ordered)) == Counter(map(answer, t.sql(query).collect())), query


def answer(row: Any) -> str:
    """An echoed row without the spec, in which the rules write."""
    return str([value.partition('", ')[2] if isinstance(value, str) else value for value in row])


def test_equal_prefixes_meet_in_one_task_and_are_neighbours_there(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', info, n) AS a FROM t")
    assert exchanges(df) == [("info", 2)]
    answers = [row.a for row in df.collect()]
    assert len(answers) == 40
    runs = 1 + sum(a != b for a, b in itertools.pairwise(answers))
    assert runs == len(set(answers)) == 12
