"""Builds the files of ``datasets/data`` from the packages they come from; run once by a maintainer.

``python -P -m spark_llm.datasets.prepare --vader vaderSentiment-3.3.2.tar.gz --films movies.db``,
where the first is the sdist of vaderSentiment and the second comes out of the wheel of bokeh-sampledata. Same
input, same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import html
import io
import sqlite3
import tarfile
from pathlib import Path

import pandas as pd

DATA = Path(__file__).resolve().parent / "data"

# The reviews of one product stand together, in the order of Hu & Liu (2004); first the first review.
PRODUCTS = [
    (1, 1, "Apex AD-2600", "Apex", "DVD player"),
    (99, 2, "Canon PowerShot G3", "Canon", "digital camera"),
    (145, 3, "Nikon Coolpix 4300", "Nikon", "digital camera"),
    (176, 4, "Nokia 6610", "Nokia", "mobile phone"),
    (216, 5, "Creative Zen Xtra", "Creative", "MP3 player"),
]

FILMS_QUERY = """
SELECT o.ID AS film_id, o.imdbID AS imdb_id, o.Title AS title, o.Year AS year,
       CAST(o.Runtime AS INT) AS minutes, o.Genre AS genre, o.Director AS director, o."Cast" AS actors,
       o.Country AS country, o.Language AS language, o.Oscars AS oscars,
       t.Meter AS critics_score, t.Reviews AS critics_reviews
FROM omdb AS o JOIN tomatoes AS t USING (ID)
WHERE o.Year BETWEEN 1998 AND 2004
ORDER BY o.ID
"""


def products() -> pd.DataFrame:
    """The five reviewed products."""
    columns = ["first_review", "product_id", "name", "brand", "category"]
    return pd.DataFrame(PRODUCTS, columns=columns).drop(columns="first_review")


def sentences(sdist: Path) -> pd.DataFrame:
    """One row a sentence of an Amazon review, with the mean of 20 people's ratings (-4 to 4)."""
    with tarfile.open(sdist) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        member = outer.extractfile(name)
        assert member is not None
        with tarfile.open(fileobj=io.BytesIO(member.read())) as inner:
            table = inner.extractfile("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt")
            assert table is not None
            text = table.read().decode("ascii")
    rows = []
    for line in text.splitlines():
        key, score, sentence = line.split("\t")
        review, number = map(int, key.split("_"))
        product = max(p for p in PRODUCTS if p[0] <= review)[1]
        rows.append((review, product, number, float(score), " ".join(html.unescape(sentence).split())))
    return pd.DataFrame(rows, columns=["review_id", "product_id", "sentence_no", "score", "sentence"])


def films(database: Path) -> pd.DataFrame:
    """Wikidata's films of 1998 to 2004 that have a critics' score."""
    with sqlite3.connect(database) as connection:
        return pd.read_sql(FILMS_QUERY, connection).convert_dtypes()


def write(frame: pd.DataFrame, name: str) -> None:
    """CSV, gzipped without a time stamp when the name ends in .gz."""
    body = frame.to_csv(index=False, lineterminator="\n").encode("utf-8")
    (DATA / name).write_bytes(gzip.compress(body, 9, mtime=0) if name.endswith(".gz") else body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vader", type=Path, required=True, help="sdist of vaderSentiment 3.3.2")
    parser.add_argument("--films", type=Path, required=True, help="movies.db of bokeh-sampledata 2026.1")
    arguments = parser.parse_args()
    DATA.mkdir(exist_ok=True)
    write(products(), "products.csv")
    write(sentences(arguments.vader), "review_sentences.csv.gz")
    write(films(arguments.films), "films.csv.gz")


if __name__ == "__main__":
    main()
