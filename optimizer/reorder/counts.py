"""A field order from counts alone (a catalog's statistics): what to do where there are no rows to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence


def order_by_counts(
    rows: int, distinct: Sequence[int], lengths: Sequence[float], tables: Sequence[int | None] | None = None
) -> tuple[list[int], float]:
    """The order in which a prefix cache finds most tokens, and the share of the fields' tokens that it finds.

    rows: of the table. distinct, lengths: of each field, values and mean tokens of a cell. tables: what table a field
    comes from; fields of one table with equally many values are taken to determine each other, others to be
    independent of each other. Greedy: next is the field that adds most found tokens, so a long text that repeats
    comes before a short one that repeats more often. (Liu et al., arXiv 2403.05821, section 4, use
    length² x (rows / distinct - 1) for each field by itself.)
    """
    left = list(range(len(distinct)))
    order: list[int] = []
    prefixes, hits = 1.0, 0.0
    while left:
        sizes = {field: _distinct_with(prefixes, field, order, rows, distinct, tables) for field in left}
        # Ties: the field that splits the rows least, then the one written first.
        best = max(left, key=lambda field: (lengths[field] * (rows - sizes[field]), -sizes[field], -field))
        hits += lengths[best] * max(0.0, rows - sizes[best])
        prefixes = sizes[best]
        order.append(best)
        left.remove(best)
    total = rows * sum(lengths)
    return order, hits / total if total else 0.0


def _distinct_with(
    prefixes: float,
    field: int,
    before: Sequence[int],
    rows: int,
    distinct: Sequence[int],
    tables: Sequence[int | None] | None,
) -> float:
    """How many prefixes there are when ``field`` follows the fields ``before``, of which there are ``prefixes``."""
    own = min(rows, distinct[field])
    for other in before:
        same_table = tables is not None and tables[field] is not None and tables[field] == tables[other]
        if same_table and abs(distinct[other] - own) <= 0.02 * own:
            return prefixes
    cells = prefixes * own
    if cells <= 1:
        return 1.0
    # Rows fall into the pairs of prefix and value at random; at least every prefix and every value occurs.
    occupied = -cells * math.expm1(-rows / cells)
    return min(float(rows), max(prefixes, own, occupied))
