"""Made tables for the solver's benchmark: small ones that the oracle can solve, and large ones of real shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.int64]
Rng = np.random.Generator

ROWS, FIELDS = 8, 4
FILLER = "the quick brown fox jumps over the lazy dog and runs on through a wood of words without end "


def texts(rng: Rng, count: int, low: int, high: int) -> list[str]:
    """Distinct texts of ``low`` to ``high`` characters, longer where a number needs more."""
    lengths = rng.integers(low, high + 1, count)
    return [
        f"{n} {FILLER * (length // len(FILLER) + 1)}"[: max(length, len(str(n)) + 1)]
        for n, length in enumerate(lengths)
    ]


def independent(rng: Rng) -> list[Ints]:
    return [rng.integers(0, int(rng.integers(1, 7)), ROWS) for _ in range(FIELDS)]


def skewed(rng: Rng) -> list[Ints]:
    return [np.minimum(rng.zipf(float(rng.uniform(1.3, 3)), ROWS) - 1, 7) for _ in range(FIELDS)]


def correlated(rng: Rng) -> list[Ints]:
    hidden = rng.integers(0, 4, ROWS)
    return [
        np.where(rng.random(ROWS) < 0.3, rng.integers(0, 8, ROWS), hidden * int(rng.integers(1, 4)) % 8)
        for _ in range(FIELDS)
    ]


def dependent(rng: Rng) -> list[Ints]:
    """A key, a field that it determines both ways, one that it determines one way, and one of its own."""
    key = rng.integers(0, int(rng.integers(2, 6)), ROWS)
    columns = [key, rng.permutation(6)[key], rng.integers(0, 3, 6)[key], rng.integers(0, 4, ROWS)]
    return [columns[place] for place in rng.permutation(FIELDS)]


def few(rng: Rng) -> list[Ints]:
    return [rng.integers(0, 2, ROWS) for _ in range(FIELDS)]


def sparse(rng: Rng) -> list[Ints]:
    """Mostly distinct values, and some that repeat."""
    return [np.where(rng.random(ROWS) < 0.5, rng.integers(0, 2, ROWS), 2 + np.arange(ROWS) % 6) for _ in range(FIELDS)]


SMALL: dict[str, Callable[[Rng], list[Ints]]] = {
    f.__name__: f for f in (independent, skewed, correlated, dependent, few, sparse)
}
LENGTHS: dict[str, Callable[[Rng], int]] = {
    "even": lambda rng: int(rng.integers(1, 30)),
    "equal": lambda rng: 8,
    "uneven": lambda rng: 1 + int(rng.lognormal(2, 1.5)),
}


def small_table(kind: str, rng: Rng) -> list[list[tuple[str, str]]]:
    """A table of 8 x 4 as rows of cells. The lengths of its values are of each kind in turn."""
    length = list(LENGTHS.values())[int(rng.integers(len(LENGTHS)))]
    columns = []
    for codes in SMALL[kind](rng):
        values = [chr(97 + code) * length(rng) for code in range(int(codes.max()) + 1)]
        columns.append([values[code] for code in codes])
    return [[(f"field_{n}", value) for n, value in enumerate(row)] for row in zip(*columns, strict=True)]


def zipf(rng: Rng, rows: int, values: int) -> Ints:
    return np.minimum(values * rng.random(rows) ** 2.5, values - 1).astype(np.int64)


def frame(columns: dict[str, tuple[Ints, list[str]]]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(np.array(values, object)[codes]) for name, (codes, values) in columns.items()})


def reviews(rows: int, rng: Rng) -> pd.DataFrame:
    """9 fields: users and times, four marks, a product's name, its style and its number."""
    products, users = max(rows // 20, 1), max(rows // 8, 1)
    product = zipf(rng, rows, products)
    columns = {
        "user": (zipf(rng, rows, users), texts(rng, users, 4, 15)),
        "time": (rng.integers(0, rows, rows), [str(1_200_000_000 + 61 * n) for n in range(rows)]),
    }
    for name, values in (("overall", 20), ("taste", 10), ("aroma", 10), ("look", 5)):
        columns[name] = (zipf(rng, rows, values), [f"{n + 1}/{values}" for n in range(values)])
    columns["name"] = (product, texts(rng, products, 8, 45))
    columns["style"] = ((product * 2654435761) % 89, texts(rng, 89, 6, 25))
    columns["number"] = (product, [str(7 * n + 11) for n in range(products)])
    return frame(columns)


def wide(rows: int, rng: Rng) -> pd.DataFrame:
    """57 fields: two keys with fields that they determine, marks, categories, and texts that hardly repeat."""
    first, second = rng.integers(0, 400, rows), rng.integers(0, 60, rows)
    columns: dict[str, tuple[Ints, list[str]]] = {}
    for n in range(57):
        low, high = int(rng.integers(1, 10)), int(rng.integers(10, 60))
        match n % 6:
            case 0:
                codes = first
            case 1:
                codes = (first * 7 + 3) % (50 + n)
            case 2:
                codes = second
            case 3:
                codes = rng.integers(0, 2 + 3 * n, rows)
            case 4:
                codes = rng.integers(0, rows // (1 + n % 4), rows)
            case _:
                codes = zipf(rng, rows, 30)
        columns[f"column_{n}"] = (codes, texts(rng, int(codes.max()) + 1, low, high))
    return frame(columns)


def disjoint(rows: int, rng: Rng) -> pd.DataFrame:
    """4 fields and groups of 500 rows: each group shares one long field, which differs by group, and no other."""
    columns = {}
    for n in range(4):
        codes = np.arange(rows)
        codes[(np.arange(rows) // 500) % 4 == n] = rows + np.arange(rows)[(np.arange(rows) // 500) % 4 == n] // 500
        values = [f"{code:06d}" for code in range(rows)] + [
            f"{code:06d} " + FILLER[:80] for code in range(rows // 500 + 1)
        ]
        columns[f"field_{n}"] = (codes, values)
    return frame(columns)


LARGE: dict[str, tuple[Callable[[int, Rng], pd.DataFrame], int]] = {
    "reviews": (reviews, 30_000),
    "wide": (wide, 10_000),
    "disjoint": (disjoint, 2_000),
}


def large_table(name: str, rows: int | None = None) -> pd.DataFrame:
    """A large table, its rows shuffled."""
    make, usual = LARGE[name]
    rng = np.random.default_rng(17)
    table = make(rows or usual, rng)
    return table.iloc[rng.permutation(len(table))].reset_index(drop=True)


def read_table(path: str) -> pd.DataFrame:
    """A CSV file, all text, its rows shuffled."""
    table: Any = pd.read_csv(path, dtype=str, keep_default_na=False)
    shuffled: pd.DataFrame = table.sample(frac=1, random_state=0).reset_index(drop=True)
    return shuffled
