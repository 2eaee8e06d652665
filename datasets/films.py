"""Films: 3,124 films of 1998 to 2004 from Wikidata, a wide table of short fields."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

DATA = Path(__file__).resolve().parent / "data"


def load() -> dict[str, pd.DataFrame]:
    """``films``: title, year, genre, director, actors and more; absent values are NA."""
    return {"films": pd.read_csv(DATA / "films.csv.gz").convert_dtypes()}
