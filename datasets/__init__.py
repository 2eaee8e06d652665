"""Real tables to try LLM queries on, and a generator of larger ones of the same shape.

>>> from spark_llm import datasets
>>> datasets.register(spark, "movies")  # doctest: +SKIP
['movies', 'reviews']
"""

from spark_llm.datasets.catalogue import CATALOGUE, Dataset, Table, load
from spark_llm.datasets.generate import generate_movies
from spark_llm.datasets.views import register

__all__ = ["CATALOGUE", "Dataset", "Table", "generate_movies", "load", "register"]
