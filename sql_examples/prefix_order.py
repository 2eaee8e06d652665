"""What the optimizer does about prompts that share: fields in an unhelpful order, explained, run both ways, compared.

python sql_examples/prefix_order.py
"""

from __future__ import annotations

import spark_llm
from spark_llm import datasets

QUERY = """
SELECT title, quote,
       llm('Does the critic like the film? Answer yes or no.',
           review_id, quote, title, plot, {option} max_tokens => 2) AS liked
FROM reviews JOIN movies USING (movie_id)
WHERE genre LIKE '%War%'
"""


def main() -> None:
    spark = spark_llm.session("local[2]", conf={"spark.ui.enabled": "false", "spark.log.level": "ERROR"})
    datasets.register(spark, "movies")

    print("As written: every prompt begins with the number of its review.")
    spark.sql(QUERY.format(option="order => 'as_written',")).collect()
    print(spark_llm.last_report(spark))

    print("\nBy the rules: the plot, which all reviews of a film have, stands first.")
    optimised = spark.sql(QUERY.format(option=""))
    optimised.collect()
    print(spark_llm.last_report(spark))

    print("\nThe decisions and their reasons stand in the plan:")
    optimised.explain()

    print("What that does to answers, on a sample:")
    print(spark_llm.compare_orders(optimised, sample=20))
    spark.stop()


if __name__ == "__main__":
    main()
