"""A table without a good fixed field order: every group of rows shares one long field, but not the same one."""

from __future__ import annotations

import numpy as np
import pandas as pd

from spark_llm.datasets.paper.texts import Texts, generator

FIELDS = ("summary", "history", "terms", "contact")


def disjoint_groups(rows: int, rows_per_group: int = 500, seed: int = 0) -> pd.DataFrame:
    """Groups of ``rows_per_group`` rows that share one field of four; which one goes round by group.

    All other values are unique, all are equally long on average, rows are in random order: a fixed field order reaches
    a quarter of what an order for each group reaches. Raises ValueError for fewer than one row a group.
    """
    if rows_per_group < 1:
        raise ValueError("rows_per_group must be at least 1")
    random = generator("disjoint_groups", seed)
    texts = Texts(random)
    group = np.arange(rows) // rows_per_group
    shared = texts.texts(int(group[-1]) + 1 if rows else 0, 40, spread=0.2)
    columns = {}
    for number, name in enumerate(FIELDS):
        values = texts.texts(rows, 40, spread=0.2)
        columns[name] = np.where(group % len(FIELDS) == number, shared[group], values) if rows else values
    return pd.DataFrame(columns).iloc[random.permutation(rows)].reset_index(drop=True)
