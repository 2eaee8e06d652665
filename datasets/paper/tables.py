"""Which tables there are, what the paper says of each, and how to make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from spark_llm.datasets.paper import documents, groups, music, reviews


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of Liu et al. and the generator of its shape.

    rows, fields, input_tokens: table 1 of the paper (tokens of Llama 3's tokenizer, instruction included). original,
    published: the paper's prefix hit rates (table 2) as stored and by its algorithm, with Llama 3 8B and a cache of
    bounded size. solver_seconds: what its algorithm took (table 5). dependencies: fields that determine each other, as
    declared there (appendix B). make: ``(rows, seed) -> DataFrame``; its docstring says what is known and assumed.
    """

    rows: int
    fields: int
    input_tokens: int
    original: float
    published: float
    solver_seconds: float
    make: Callable[[int, int], pd.DataFrame]
    dependencies: tuple[tuple[str, ...], ...] = ()


TABLES: Mapping[str, PaperTable] = {
    "movies": PaperTable(
        15_000, 8, 276, 0.35, 0.86, 3.3, reviews.movies, (("movieinfo", "movietitle", "rottentomatoeslink"),)
    ),
    "products": PaperTable(14_890, 8, 377, 0.27, 0.83, 4.5, reviews.products, (("parent_asin", "product_title"),)),
    "bird": PaperTable(14_920, 4, 765, 0.10, 0.85, 1.2, documents.bird, (("Body", "PostId"),)),
    "pdmx": PaperTable(
        10_000,
        57,
        738,
        0.12,
        0.57,
        12.6,
        music.pdmx,
        (
            ("metadata", "path"),
            ("hasannotations", "hasmetadata", "isdraft", "isofficial", "isuserpublisher", "subsetall"),
        ),
    ),
    "beer": PaperTable(28_479, 8, 156, 0.50, 0.80, 8.0, reviews.beer, (("beer/beerId", "beer/name"),)),
    "squad": PaperTable(22_665, 5, 1_047, 0.11, 0.70, 4.5, documents.squad),
    "fever": PaperTable(19_929, 5, 1_302, 0.11, 0.67, 5.6, documents.fever),
}

DISJOINT = "disjoint_groups"


def table(name: str, rows: int | None = None, seed: int = 0) -> pd.DataFrame:
    """The table ``name`` of ``TABLES``, or ``disjoint_groups``, of ``rows`` rows (None: as many as in the paper).

    A smaller or larger table repeats its values as often. The same arguments give the same table on any machine.
    Raises KeyError for another name, ValueError for negative rows.
    """
    if rows is not None and rows < 0:
        raise ValueError("rows >= 0 is needed")
    if name == DISJOINT:
        return groups.disjoint_groups(10_000 if rows is None else rows, seed=seed)
    known = TABLES[name]
    return known.make(known.rows if rows is None else rows, seed)
