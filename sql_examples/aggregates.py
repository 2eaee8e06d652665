"""Aggregates over answers on the tables that come with spark-llm: python sql_examples/aggregates.py"""

from __future__ import annotations

import spark_llm
from spark_llm import datasets

# The verdict is asked of chunks of each film's reviews, then of those answers; each review is graded once.
QUERY = """
SELECT m.title,
       count(*) AS reviews,
       ai_agg(r.quote, 'What do these critics say about the film?', max_tokens => 32) AS verdict,
       ai_top_k(r.quote, 'talks about the acting', 1)[0] AS about_acting
FROM (SELECT * FROM reviews ORDER BY review_id LIMIT 40) AS r
JOIN movies AS m USING (movie_id)
GROUP BY m.title
HAVING count(*) > 1
"""


def main() -> None:
    spark = spark_llm.session("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "movies")
    spark.sql(QUERY).show(truncate=60)
    print(spark_llm.last_report(spark))
    spark.stop()


if __name__ == "__main__":
    main()
