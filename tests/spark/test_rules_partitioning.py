"""The exchange of ReorderRows: when there is one, how many partitions it makes, and how heavy values are spread."""

from __future__ import annotations

import pytest
from fake_counting import FakeModel
from plans import assert_idempotent, exchanges, planner, rows, settings, sorts, text
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from spark_llm.optimizer.reorder.ranges import slots

pytestmark = pytest.mark.spark


@pytest.fixture
def t(echo: SparkSession) -> SparkSession:
    """t(id, k, text): 400 rows in 4 partitions, 10 values of k, of which the optimizer can get statistics."""
    table = echo.range(0, 400, 1, 4).selectExpr("id", "id % 10 AS k", "concat('text ', id % 50) AS text")
    table.createOrReplaceTempView("t")
    return echo


ASKED_FOR = {
    "REPARTITION(3)": ("SELECT llm('p', k) FROM (SELECT /*+ REPARTITION(3) */ * FROM t)", [("", 3)]),
    "REPARTITION(3, id)": ("SELECT id, llm('p', k) FROM (SELECT /*+ REPARTITION(3, id) */ * FROM t)", [("id", 3)]),
    "under a filter": ("SELECT id, llm('p', k) FROM (SELECT /*+ REPARTITION(3) */ * FROM t) WHERE id > 1", [("", 3)]),
}


@pytest.mark.parametrize(("query", "expected"), ASKED_FOR.values(), ids=list(ASKED_FOR))
def test_the_user_s_partitions_stay(t: SparkSession, query: str, expected: list[tuple[str, int]]) -> None:
    df = t.sql(query)
    [plan] = rows(df)
    assert plan.order_why == "sorted in the partitions that the query asks for"
    assert (plan.is_sorted, plan.partitions) == (True, 0)
    assert len(sorts(df)) == 1
    assert exchanges(df) == [found for found in expected if found[0]]
    assert df.rdd.getNumPartitions() == 3
    assert_idempotent(df)


def test_distribute_by_and_coalesce_keep_their_partitions(t: SparkSession) -> None:
    df = t.sql("SELECT id, llm('p', k) FROM (SELECT * FROM t DISTRIBUTE BY id)")
    assert [keys for keys, _ in exchanges(df)] in ([], ["id"])
    assert text(df).count("RepartitionByExpression") == 1
    assert len(sorts(df)) == 1
    one = t.table("t").coalesce(1).selectExpr("llm('p', k)")
    assert exchanges(one) == []
    assert len(sorts(one)) == 1


def test_one_small_partition_needs_no_exchange(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', id % 5) FROM range(0, 100, 1, 1)")
    assert exchanges(df) == []
    assert len(sorts(df)) == 1
    assert rows(df)[0].order_why == "sorted in their partitions: there is one partition"


def test_few_rows_need_no_exchange(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', id % 2) FROM range(0, 8, 1, 4)")
    assert exchanges(df) == []
    assert rows(df)[0].order_why == "sorted in their partitions: there are 8 rows"


def test_values_that_never_repeat_need_no_exchange(t: SparkSession) -> None:
    df = t.sql("SELECT llm('p', id) FROM t")
    assert exchanges(df) == []
    assert len(sorts(df)) == 1
    assert rows(df)[0].order_why == "sorted in their partitions: no value repeats"
    assert exchanges(t.sql("SELECT llm('p', id, k) FROM t")) != []


def test_one_partition_with_much_work_is_cut(t: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner(t)._speed, "of", lambda application, engine, engines: 1.0)
    [(_, count)] = exchanges(t.sql("SELECT llm('p', id % 5) FROM range(0, 100, 1, 1)"))
    assert 5 <= count <= 25


def test_partitions_are_about_a_minute_of_an_engine(t: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    query = "SELECT llm('p', text, k) FROM t"
    [(_, fast)] = exchanges(t.sql(query))
    assert fast == 2  # as many as tasks run at a time
    monkeypatch.setattr(planner(t)._speed, "of", lambda application, engine, engines: 10.0)
    [(_, count)] = exchanges(t.sql(query))
    assert 4 <= count <= 20  # 400 rows of 6 to 20 tokens, 600 tokens a partition


def test_no_more_partitions_than_a_quarter_of_the_rows(t: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner(t)._speed, "of", lambda application, engine, engines: 0.1)
    [(_, count)] = exchanges(t.sql("SELECT llm('p', k, text) FROM t WHERE id < 40"))
    assert count == 10


def test_a_setting_fixes_the_number(t: SparkSession) -> None:
    settings(t, reorderRows_partitions=7)
    for query in ("SELECT llm('p', k) FROM t", "SELECT llm('p', id % 2) FROM range(0, 8, 1, 1)"):
        assert [count for _, count in exchanges(t.sql(query))] == [7]
    df = t.sql("SELECT llm('p', k) FROM t")
    for adaptive in ("true", "false"):
        t.conf.set("spark.sql.adaptive.enabled", adaptive)
        assert df.rdd.getNumPartitions() == 7  # adaptive execution does not merge them


def test_without_statistics_there_are_at_least_as_many_as_tasks_or_partitions(t: SparkSession) -> None:
    settings(t, statistics_enabled=False)
    assert [count for _, count in exchanges(t.sql("SELECT llm('p', k) FROM t"))] == [4]
    assert [count for _, count in exchanges(t.sql("SELECT llm('p', k) FROM range(9) JOIN t USING (id)"))] == [2]


def test_a_heavy_value_is_spread_by_the_rest_of_its_arguments(model: FakeModel) -> None:
    spark = model.spark
    spark.range(0, 4000, 1, 3).selectExpr(
        "if(id % 2 = 0, 'the same long text in half of the rows', concat('text ', id % 400)) AS text",
        "concat('item ', id % 1000) AS item",
    ).createOrReplaceTempView("skewed")
    settings(spark, reorderRows_partitions=8)
    df = spark.sql("SELECT text, item, llm('p', text, item) AS a FROM skewed")
    [plan] = rows(df)
    assert plan.order_why == "sorted in 8 ranges of equal work"
    assert_idempotent(df)
    answers = df.collect()
    distinct = {(row.text, row.item) for row in answers}
    assert len(model.requests()) == len(distinct)  # equal arguments still meet
    heavy = [sum("the same" in r.prompt for r in stream) for stream in model.streams()]
    assert sum(heavy) == 500
    assert max(heavy) < 300  # about half of the work is theirs: four ranges


def test_the_exchange_sends_a_range_to_its_partition(t: SparkSession) -> None:
    for count in (1, 2, 7, 200):
        words = [(word.astype("<u4").tobytes(),) for word in slots(count)]
        frame = t.createDataFrame(words, "slot BINARY").repartition(count, "slot")
        found = frame.select("slot", F.spark_partition_id().alias("partition")).collect()
        found.sort(key=lambda row: words.index((bytes(row.slot),)))
        assert [row.partition for row in found] == list(range(count))


def test_a_heavy_value_alone_is_not_spread(model: FakeModel) -> None:
    """Rows that are equal in all arguments are one call: there is nothing to spread."""
    spark = model.spark
    settings(spark, reorderRows_partitions=8)
    df = spark.sql("SELECT llm('p', if(id % 2 = 0, 'heavy', string(id % 100))) AS a FROM range(0, 2000, 1, 3)")
    assert len({row.a for row in df.collect()}) == 51
    assert len(model.requests()) == 51
