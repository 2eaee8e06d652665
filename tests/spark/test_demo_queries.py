"""The example queries on Spark, answered by a fake that echoes the call: views, plans, and what the calls get."""

from __future__ import annotations

import json

import pytest
from pyspark.sql import SparkSession

from spark_llm import datasets
from spark_llm.demo import examples, measure, show

pytestmark = pytest.mark.spark


@pytest.mark.parametrize("example", examples.read_all(), ids=lambda e: e.name)
def test_the_long_field_stands_first_and_repeats(echo: SparkSession, example: examples.Example) -> None:
    datasets.register(echo, example.dataset)
    echo.sql(example.create_view)
    rows = echo.table(example.view).toPandas()
    assert 70 <= len(rows) <= 250
    long = "review" if example.name == "05_rag" else "plot"
    assert rows[long].nunique() * 2 <= len(rows)
    assert "ArrowEvalPython" in show.plan(echo, example.select)


def test_a_projection_gets_plot_then_review(echo: SparkSession) -> None:
    (example,) = (e for e in examples.read_all() if e.name == "02_projection")
    datasets.register(echo, example.dataset)
    echo.sql(example.create_view)
    for row in echo.sql(example.select).collect():
        spec, prompt, plot, review = json.loads(row.reason)
        assert json.loads(spec)["fields"] == [{"name": "plot"}, {"name": "review"}]
        assert prompt.startswith("Why does the critic")
        assert review == row.quote
        assert len(plot) > 100


def test_retrieval_takes_the_best_three_of_each_camera(echo: SparkSession) -> None:
    (example,) = (e for e in examples.read_all() if e.name == "05_rag")
    datasets.register(echo, example.dataset)
    echo.sql(example.create_view)
    rows = echo.table(example.view).toPandas()
    assert all(sorted(ranks) == [1, 2, 3] for _, ranks in rows.groupby(["question", "camera"])["rank"])
    best = rows[(rows["rank"] == 1) & rows["question"].str.contains("battery")]
    assert best["review"].str.contains("batter").all()


def test_settings_hold_inside_the_block_only(echo: SparkSession) -> None:
    echo.conf.set("spark.llm.windowRows", "77")
    with measure.settings(echo, measure.NAIVE):
        assert echo.conf.get("spark.llm.windowRows") == "1"
        assert echo.conf.get("spark.llm.engine.prefixCache") == "false"
    assert echo.conf.get("spark.llm.windowRows") == "77"
    assert echo.conf.get("spark.llm.engine.prefixCache", None) is None
