"""Typed answers and AI functions on the tables that come with spark-llm: python sql_examples/ai_functions.py"""

from __future__ import annotations

import spark_llm
from spark_llm import datasets
from spark_llm.functions import ai_classify

# Labels cost one step of the engine a row, a BOOLEAN stands in WHERE, the fields of one answer are one call.
QUERY = """
SELECT quote, sentiment.result AS sentiment, round(sentiment.confidence, 2) AS sure, said.praised, said.criticised
FROM (
  SELECT quote,
         ai_analyze_sentiment(quote, confidence => true) AS sentiment,
         llm('What does the review praise, and what does it criticise?', quote,
             returns => 'STRUCT<praised: VARCHAR(60), criticised: VARCHAR(60)>', failOnError => false).result AS said
  FROM some_reviews
  WHERE llm_prompt('about acting', quote)
)
"""


def main() -> None:
    spark = spark_llm.session("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "movies")
    spark.sql("CREATE TEMPORARY VIEW some_reviews AS SELECT quote FROM reviews ORDER BY review_id LIMIT 12")
    spark_llm.prompt("about acting", "Is the review about the actors?", returns="BOOLEAN")

    spark.sql(QUERY).show(truncate=40)
    labels = ["plot", "actors", "pictures", "music"]
    spark.table("some_reviews").select("quote", ai_classify("quote", labels).alias("about")).show(truncate=80)
    print(spark_llm.last_report(spark))
    spark.stop()


if __name__ == "__main__":
    main()
