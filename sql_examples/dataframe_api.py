"""The same function as a Column, on the tables that come with spark-llm: python sql_examples/dataframe_api.py"""

from __future__ import annotations

from pyspark.sql import functions as F

import spark_llm
from spark_llm import datasets
from spark_llm.functions import llm


def main() -> None:
    spark = spark_llm.session("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "products")

    reviews = spark.table("product_reviews").join(spark.table("products"), "product_id")
    short = reviews.where((F.col("category") == "digital camera") & (F.length("body") < 600))
    question = "Is the battery life good? Answer the question from the review in a few words."
    answers = short.select("review_id", "name", llm(question, "name", F.col("body").alias("review"), max_tokens=16))

    answers.toDF("review_id", "camera", "answer").show(10, truncate=100)
    print(spark_llm.last_report(spark))
    spark.stop()


if __name__ == "__main__":
    main()
