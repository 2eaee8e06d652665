"""Four tables to join, as a shop has them: sales, items with descriptions, customers with notes, reviews.

Texts are real English phrases in a random order (spark_llm.datasets.paper.texts); a tenth of the reviews repeat
another one word by word. The same number of rows gives the same tables on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spark_llm.datasets.paper.texts import Texts, entities, generator, missing, popular

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ITEM_SALES = 20.0  # sales of an item, of a customer, and sales for each review
CUSTOMER_SALES = 10.0
REVIEW_SALES = 2.0
CATEGORIES = np.array(["audio", "video", "kitchen", "garden", "sport"], object)
SEGMENTS = np.array(["private", "business", "school", "club"], object)
CITIES = np.array(["Lima", "Oslo", "Turin", "Quito", "Leeds", "Kyoto"], object)


def tables(rows: int) -> dict[str, pd.DataFrame]:
    """The tables by name; ``rows`` are those of sales, at least 40."""
    random = generator("shop", 0)
    texts = Texts(random)
    items, customers, reviews = (entities(rows, each) for each in (ITEM_SALES, CUSTOMER_SALES, REVIEW_SALES))
    category = CATEGORIES[random.integers(0, len(CATEGORIES), items)]
    written = texts.texts(reviews, 18, spread=0.4)
    written[random.permutation(reviews)[: reviews // 10]] = written[0]
    return {
        "items": pd.DataFrame(
            {
                "item_id": np.arange(items),
                "name": texts.names(items, 2),
                "brand": texts.names(max(2, items // 5), 1)[random.integers(0, max(2, items // 5), items)],
                "category": missing(category, random.random(items) < 0.25),
                "description": texts.texts(items, 30, spread=0.4),
            }
        ),
        "customers": pd.DataFrame(
            {
                "customer_id": np.arange(customers),
                "city": CITIES[random.integers(0, len(CITIES), customers)],
                "segment": SEGMENTS[random.integers(0, len(SEGMENTS), customers)],
                "notes": texts.texts(customers, 15, spread=0.4),
            }
        ),
        "sales": pd.DataFrame(
            {
                "sale_id": np.arange(rows),
                "item_id": popular(random, items, rows, 0.9),
                "customer_id": popular(random, customers, rows, 0.6),
                "day": random.integers(0, 360, rows),
                "quantity": random.integers(1, 6, rows),
                "price": np.round(random.lognormal(3.0, 0.8, rows), 2),
            }
        ),
        "reviews": pd.DataFrame(
            {
                "review_id": np.arange(reviews),
                "item_id": popular(random, items, reviews, 0.9),
                "customer_id": random.integers(0, customers, reviews),
                "stars": random.choice(np.arange(1, 6), reviews, p=[0.12, 0.08, 0.15, 0.3, 0.35]),
                "review": written,
            }
        ),
    }


def make_tables(spark: SparkSession, folder: Path, rows: int) -> None:
    """Write the tables as Parquet and make them temporary views of the session."""
    for name, frame in tables(rows).items():
        path = str(folder / name)
        spark.createDataFrame(frame).repartition(4 if name in ("sales", "reviews") else 2).write.parquet(path)
        spark.read.parquet(path).createOrReplaceTempView(name)
