"""Functional dependencies between fields, found in the rows: which fields a field takes along when it leads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# A dependency may have exceptions, as data that people typed in have. Repetition that is too rare proves nothing.
_HOLDS = 0.95
_LEAST_PAIRS, _LEAST_SHARE = 16, 0.1
_PROBES = 256


def with_followers(cells: Ints, weights: Floats) -> Floats:
    """The weight of each cell together with the cells that it determines, float64 [cell numbers].

    A field determines another if rows that are equal in it are equal in the other. ``cells`` [rows, fields] and
    ``weights`` [cell numbers] as for ``group_orders``. Cost: a sort a field, and a look at few pairs of rows a pair of
    fields unless these are all equal.
    """
    rows, fields = cells.shape
    heavier = weights.copy()
    for field in range(fields):
        by_value = np.argsort(cells[:, field], kind="stable")
        ordered = cells[by_value, field]
        repeats = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(repeats) < max(_LEAST_PAIRS, _LEAST_SHARE * rows):
            continue
        one, other = by_value[repeats], by_value[repeats + 1]
        probes = slice(None, None, max(len(repeats) // _PROBES, 1))
        likely = (cells[one[probes]] == cells[other[probes]]).mean(axis=0) >= _HOLDS
        first = by_value[np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))]
        leading = cells[first, field]
        for follower in np.flatnonzero(likely).tolist():
            if follower != field:
                holds = float((cells[one, follower] == cells[other, follower]).mean())
                if holds >= _HOLDS:
                    heavier[leading] += holds * weights[cells[first, follower]]
    return heavier
