"""Aggregates over answers on the film reviews that come with spark-llm: python sql_examples/aggregates.py"""

from __future__ import annotations

import textwrap

import spark_llm
from spark_llm import datasets

# One question about all reviews of a film, which fit one prompt each; and a grade for each review.
BY_FILM = """
SELECT m.title,
       count(*) AS reviews,
       count_if(r.verdict = 'fresh') AS fresh,
       ai_agg(r.quote, 'What do critics like about this film?', max_tokens => 40)
           FILTER (WHERE r.verdict = 'fresh') AS liked,
       ai_top_k(r.quote, 'the critic writes about the acting', 2) AS about_acting
FROM reviews AS r JOIN movies AS m USING (movie_id)
WHERE m.title IN ('Insomnia', 'Swimfan')
GROUP BY m.title
HAVING count(*) > 5
ORDER BY fresh / reviews DESC
"""

# 100 reviews are more than a prompt holds: chunks of them are asked about first, then their answers.
OVERALL = """
SELECT count(*) AS reviews,
       ai_agg(quote, 'What do these critics complain about?', max_tokens => 40) AS complaints
FROM (SELECT quote FROM reviews WHERE verdict = 'rotten' ORDER BY review_id LIMIT 100)
"""


def main() -> None:
    spark = spark_llm.session("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "movies")
    for row in spark.sql(BY_FILM).collect():
        print(f"\n{row.title}: {row.fresh} of {row.reviews} reviews are fresh")
        show("liked", row.liked)
        for number, quote in enumerate(row.about_acting, 1):
            show(f"about the acting, {number}", quote)
    print(spark_llm.last_report(spark))
    [row] = spark.sql(OVERALL).collect()
    print(f"\n{row.reviews} rotten reviews of all films")
    show("complaints", row.complaints)
    print(spark_llm.last_report(spark))
    spark.stop()


def show(name: str, text: str | None) -> None:
    lines = textwrap.wrap(text or "nothing", width=90)
    print(textwrap.indent("\n".join([f"{name}: {lines[0]}", *lines[1:]]), "  "))


if __name__ == "__main__":
    main()
