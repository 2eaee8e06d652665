"""What an exchange costs: calls are the distinct rows in however many partitions, and tasks keep shared prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_counting import FakeModel, Request
from plans import orders, prompts, rows, settings
from pyspark.sql import DataFrame

from spark_llm.datasets.paper import disjoint_groups
from spark_llm.optimizer.reorder.measure import phr

pytestmark = pytest.mark.spark

Sequences = list[list[Request]]


def hit_rate(sequences: Sequences) -> float:
    """The share of the fields' characters that are in whole leading cells which the row before has, too."""
    lengths = [sum(len(value) for request in sequence for _, value in request.cells) for sequence in sequences]
    hits = [
        phr([list(request.cells) for request in sequence]) * length
        for sequence, length in zip(sequences, lengths, strict=True)
    ]
    return sum(hits) / sum(lengths)


def in_one_partition(sequences: Sequences) -> Sequences:
    """The same prompts as a task asks them that has all of them."""
    return [sorted((request for sequence in sequences for request in sequence), key=lambda request: request.segments)]


def assert_next_to_nothing_is_lost(model: FakeModel, partitions: int, lost_by_random: float) -> None:
    """At least ``lost_by_random`` is what random partitions lose, to show that there is something to lose."""
    sequences = model.streams()
    assert len(sequences) >= 0.7 * partitions
    one = hit_rate(in_one_partition(sequences))
    assert hit_rate(sequences) >= one - 0.02
    scattered = [request for sequence in sequences for request in sequence]
    scattered.sort(key=lambda request: request.key or "")
    size = len(scattered) // partitions
    random = [in_one_partition([scattered[i : i + size]])[0] for i in range(0, len(scattered), size)]
    assert hit_rate(random) <= one - lost_by_random


def ask(model: FakeModel, table: DataFrame, partitions: int) -> DataFrame:
    settings(model.spark, reorderRows_partitions=partitions)
    table.createOrReplaceTempView("asked")
    df = model.spark.sql("SELECT llm('Is it good?', *) AS a FROM asked")
    df.write.format("noop").mode("overwrite").save()
    return df


@pytest.mark.slow
def test_groups_of_500_rows_and_one_value_with_half_of_them(model: FakeModel) -> None:
    """40,000 rows, each twice, from 200 partitions to 200."""
    table = model.spark.range(0, 40_000, 1, 200).selectExpr(
        "concat('item ', id % 20000) AS item",
        "if(id % 2 = 0, 'the text that half of the rows have, and which is rather long',"
        " concat('the text of group ', int(id % 20000 / 1000), ', which has five hundred rows')) AS text",
    )
    df = ask(model, table, 200)
    assert orders(df) == [["text", "item"]]
    assert rows(df)[0].partitions == 200
    requests = model.requests()
    assert len(requests) == len({request.key for request in requests}) == 20_000
    assert_next_to_nothing_is_lost(model, 200, 0.1)
    heaviest = max(len(sequence) for sequence in model.streams())
    assert heaviest < 3 * 100  # half of the rows are not half of a task's work


def test_groups_that_share_another_field_each(model: FakeModel, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every group of 500 rows has an order of its own, and its rows meet."""
    path = str(Path(tmp_path_factory.mktemp("groups")) / "table")
    model.spark.createDataFrame(disjoint_groups(6000)).write.parquet(path)
    df = ask(model, model.spark.read.parquet(path), 30)
    assert prompts(df)[0].table is not None
    assert len(model.requests()) == 6000
    sequences = model.streams()
    assert hit_rate(in_one_partition(sequences)) > 0.23  # at best a quarter, less a first row for each group
    assert_next_to_nothing_is_lost(model, 30, 0.01)


def test_shared_texts_of_a_join(model: FakeModel) -> None:
    """Without groups, and with a field that every row has: 60 dimension rows, 6,000 facts."""
    spark = model.spark
    spark.range(60).selectExpr(
        "id AS k", "repeat(concat('a description of ', id, '. '), 5) AS description"
    ).createOrReplaceTempView("d")
    facts = spark.range(0, 6000, 1, 8).selectExpr("id % 60 AS k", "concat('fact ', id) AS fact", "'en' AS language")
    facts.createOrReplaceTempView("f")
    df = ask(model, spark.sql("SELECT fact, language, description FROM f JOIN d USING (k)"), 16)
    assert prompts(df)[0].table is None
    assert orders(df)[0][-1] == "fact"
    assert len(model.requests()) == 6000
    assert_next_to_nothing_is_lost(model, 16, 0.1)
