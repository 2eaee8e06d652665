"""The calls of the suite's queries, and the hand that runs statements which name them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

YES_NO = "Answer only Yes or No."
CALLS = {
    "POSITIVE": f"llm('Does the writer of this review like the product? {YES_NO}', review{{o}})",
    "TOPIC": "llm('What is this review about? Answer only price, quality, delivery, service or design.', review{o})",
    "URGENCY": "llm('How urgent is the complaint in this review? Answer only 1, 2, 3, 4 or 5.', review{o})",
    "LUXURY": f"llm('Is the product of this description a luxury? {YES_NO}', description{{o}})",
    "KIND": "llm('What kind of product is it? Answer only audio, video, kitchen, garden or sport.', description{o})",
    "SLOGAN": "llm('Write a slogan of three words for it.', name, description{o})",
    "LOYAL": f"llm('Do these notes describe a loyal customer? {YES_NO}', notes{{o}})",
    "REASON": "llm('Sum these notes up in three words.', notes{o})",
    "SAME": f"llm('Is this the same product twice? {YES_NO}', x.description, other => y.description{{o}})",
    "SAME_PAIR": f"llm('Is this the same product twice? {YES_NO}', description, other => second{{o}})",
    "SUITS": f"llm('Would people of this segment buy things of this category? {YES_NO}', x.segment, y.category{{o}})",
}


class Hand:
    """Runs statements whose calls are written ``<NAME>``. options: what each call gets, ``max_tokens => 4, ...``."""

    def __init__(self, spark: SparkSession, options: str) -> None:
        self._spark = spark
        self._calls = {f"<{name}>": call.format(o=f", {options}") for name, call in CALLS.items()}
        self.options = options

    def rows(self, sql: str) -> list[Any]:
        """The rows of a query."""
        return self._spark.sql(self._written(sql)).collect()

    def keep(self, name: str, sql: str) -> None:
        """Run a query now and keep its rows as the view ``name``."""
        self._spark.sql(self._written(sql)).localCheckpoint().createOrReplaceTempView(name)

    def _written(self, sql: str) -> str:
        for name, call in self._calls.items():
            sql = sql.replace(name, call)
        return sql.replace("<o>", f", {self.options}")
