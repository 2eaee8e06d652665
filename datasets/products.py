"""Products: 300 Amazon reviews of five products, sentence by sentence with human scores, and questions."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

DATA = Path(__file__).resolve().parent / "data"


def load() -> dict[str, pd.DataFrame]:
    """``products``, ``product_reviews`` (whole texts), ``review_sentences`` and ``questions``.

    A sentence joined with its whole review repeats the review a dozen times.
    """
    sentences = pd.read_csv(DATA / "review_sentences.csv.gz")
    reviews = (
        sentences.groupby(["review_id", "product_id"], as_index=False)
        .agg(score=("score", "mean"), body=("sentence", " ".join))
        .round({"score": 3})
    )
    return {
        "products": pd.read_csv(DATA / "products.csv"),
        "product_reviews": reviews,
        "review_sentences": sentences.drop(columns="product_id"),
        "questions": pd.read_csv(DATA / "questions.csv"),
    }
