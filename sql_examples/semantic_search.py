"""Search by meaning, near duplicates and a filter before a model is asked, over the film reviews that come with
spark-llm: python sql_examples/semantic_search.py
"""

from __future__ import annotations

import spark_llm
from spark_llm import datasets

# The question is embedded once, each different review once, and no index is made.
SEARCH = """
SELECT round(ai_similarity(quote, 'a comedy that nobody in the audience laughed about'), 2) AS near, quote
FROM reviews WHERE quote IS NOT NULL ORDER BY near DESC LIMIT 5
"""

# Films whose descriptions are alike: each side of the join is embedded once, pairs are only compared.
ALIKE = """
SELECT a.title AS film, b.title AS like_it, round(ai_similarity(a.plot, b.plot, truncate => 'longest'), 2) AS near
FROM movies AS a JOIN movies AS b ON a.title < b.title
WHERE ai_similarity(a.plot, b.plot, truncate => 'longest') > 0.45
ORDER BY near DESC LIMIT 5
"""

# Of the reviews the cheap condition leaves a few, and only about these the model is asked.
FILTERED = """
SELECT quote FROM reviews
WHERE ai_similarity(quote, 'the acting is wooden') > 0.5
  AND llm('Does the critic dislike the acting?', quote, returns => 'BOOLEAN')
"""


def main() -> None:
    spark = spark_llm.session("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "movies")
    for query in (SEARCH, ALIKE, FILTERED):
        spark.sql(query).show(truncate=100)
        print(spark_llm.last_report(spark))
    # Vectors that are asked for again and again are a column like any other.
    vectors = spark.sql("SELECT title, ai_embed(plot, truncate => 'longest') AS vector FROM movies LIMIT 3")
    vectors.selectExpr("title", "size(vector) AS numbers", "slice(vector, 1, 3) AS first_three").show(truncate=60)
    spark.stop()


if __name__ == "__main__":
    main()
