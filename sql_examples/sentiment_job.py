"""A job for spark-submit: read a table of reviews, add a column with their sentiment, write it as Parquet.

spark-submit sql_examples/sentiment_job.py --input reviews.parquet --text review --output labelled

Any Python that has spark-llm installed will do on the executors: say which with --conf spark.pyspark.python=...
"""

from __future__ import annotations

import argparse

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import spark_llm
from spark_llm.functions import llm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, help="Parquet, CSV (with a header) or JSON, by its name's ending")
    parser.add_argument("--text", default="review", help="the column that holds the text")
    parser.add_argument("--output", required=True, help="a folder for Parquet; it is overwritten")
    arguments = parser.parse_args()

    spark = spark_llm.enable(SparkSession.builder.appName("sentiment").getOrCreate())
    kind = next((k for k in ("csv", "json") if arguments.input.rstrip("/").endswith(k)), "parquet")
    table = spark.read.option("header", True).format(kind).load(arguments.input)

    answer = llm(
        "Classify the sentiment of the review as positive or negative. Reply with one word only.",
        F.col(arguments.text).alias("review"),
        system="You are a sentiment classifier. You reply with one word: positive or negative.",
        max_tokens=3,
    )
    word = F.regexp_extract(F.lower(answer), "positive|negative", 0)
    table.withColumn("sentiment", F.nullif(word, F.lit(""))).write.mode("overwrite").parquet(arguments.output)

    print(spark_llm.last_report(spark))
    spark.stop()


if __name__ == "__main__":
    main()
