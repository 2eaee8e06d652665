"""Two users of one Spark application: a backfill over many rows, and a dashboard that wants twenty of them now.

spark-submit sql_examples/fair_queries.py

The backfill starts first and has more partitions than there are task slots. Its calls take half of the slots, and the
engine serves both users alike, so the dashboard does not wait for the backfill, which is cancelled at the end.
"""

from __future__ import annotations

import threading
import time

from pyspark import InheritableThread
from pyspark.sql import SparkSession

import spark_llm
from spark_llm import datasets
from spark_llm.engine.service.client import list_engines

BACKFILL = """
SELECT review_id, turn, llm('Say in one sentence what the critic thinks.', quote, turn, max_tokens => 24) AS summary
FROM reviews CROSS JOIN (SELECT id AS turn FROM range(0, 400, 1, 40))
"""
DASHBOARD = """
SELECT quote, llm('Does the critic like the film? Answer yes or no.', quote, max_tokens => 2) AS liked
FROM reviews LIMIT 20
"""


def main() -> None:
    spark = spark_llm.session("local[4]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "movies")
    spark.sql("SELECT llm('Say yes.', max_tokens => 1, x => 1)").collect()  # so that the engine runs

    print(f"The dashboard alone: {seconds(spark):.1f} s")
    spark_llm.clear_cache(spark)

    backfill = InheritableThread(target=ask, args=(spark,))
    backfill.start()
    tick = threading.Event()
    while backfill.is_alive() and not any(status.streams and status.running for status in list_engines()):
        tick.wait(0.2)  # until the engine works on the backfill
    print(f"Beside the backfill: {seconds(spark):.1f} s")
    waiting = sum(status.waiting for status in list_engines())

    spark.sparkContext.cancelJobGroup("backfill")
    backfill.join()
    print(f"The backfill was cancelled while {waiting:,} of its rows waited.")
    spark.stop()


def ask(spark: SparkSession) -> None:
    """The backfill, in the pool and the job group of its user."""
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", "backfill")
    spark.sparkContext.setJobGroup("backfill", "a sentence about every review")
    try:
        spark.sql(BACKFILL).collect()
    except Exception as error:
        print(f"The backfill ended with {type(error).__name__}.")


def seconds(spark: SparkSession) -> float:
    """How long the dashboard waits for its twenty rows."""
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", "dashboard")
    start = time.monotonic()
    spark.sql(DASHBOARD).collect()
    return time.monotonic() - start


if __name__ == "__main__":
    main()
