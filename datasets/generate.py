"""Larger tables of the shape of ``movies``: a long text per film, short texts per review, joined many to one.

Every text is put together from real sentences of the shipped product reviews, so that token statistics stay
those of English; what the texts say has no meaning. Same arguments, same tables, on any machine.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from spark_llm.datasets import products

PLOT_CHARACTERS = 680  # the means of the real tables
QUOTE_CHARACTERS = 113


def generate_movies(
    num_reviews: int,
    *,
    reviews_per_movie: float = 31.0,
    plot_characters: float = PLOT_CHARACTERS,
    quote_characters: float = QUOTE_CHARACTERS,
    duplicates: float = 0.0,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """``movies`` (movie_id, title, plot) and ``reviews`` (review_id, movie_id, quote) in random order.

    num_reviews: rows of ``reviews``. reviews_per_movie: their mean number a film; popular films have more.
    duplicates: the share of reviews that repeat an earlier one of the same film word by word.
    Raises ValueError for numbers that make no table.
    """
    if num_reviews < 0 or reviews_per_movie < 1 or not 0 <= duplicates < 1:
        raise ValueError("num_reviews >= 0, reviews_per_movie >= 1 and 0 <= duplicates < 1 are needed")
    random = np.random.default_rng(seed)
    pool = products.load()["review_sentences"]["sentence"].to_numpy(dtype=object)
    num_movies = max(1, round(num_reviews / reviews_per_movie)) if num_reviews else 0
    movies = pd.DataFrame(
        {
            "movie_id": np.arange(1, num_movies + 1),
            "title": [f"Film {i}" for i in range(1, num_movies + 1)],
            "plot": [_text(random, pool, plot_characters) for _ in range(num_movies)],
        }
    )
    popularity = random.gamma(4.0, size=num_movies)
    shares = popularity / popularity.sum()
    chosen = random.choice(num_movies, num_reviews, p=shares) if num_movies else np.array([], np.int64)
    quotes: list[str] = []
    earlier: dict[int, list[str]] = {}
    for movie in chosen:
        written = earlier.setdefault(int(movie), [])
        if written and random.random() < duplicates:
            quotes.append(written[random.integers(len(written))])
        else:
            quotes.append(_text(random, pool, quote_characters))
            written.append(quotes[-1])
    reviews = pd.DataFrame(
        {
            "review_id": np.arange(1, num_reviews + 1),
            "movie_id": chosen + 1,
            "quote": pd.Series(quotes, dtype=object),
        }
    )
    return {"movies": movies, "reviews": reviews}


def _text(random: np.random.Generator, pool: np.ndarray, characters: float) -> str:
    """Whole sentences, cut at a word, of about ``characters`` (log-normal, as real texts are)."""
    length = characters * random.lognormal(mean=-0.08, sigma=0.4)
    text = str(pool[random.integers(len(pool))])
    while len(text) < length:
        text += " " + str(pool[random.integers(len(pool))])
    return text if len(text) <= length else text[: int(length)].rsplit(" ", 1)[0]
