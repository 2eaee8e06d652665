"""Functional dependencies between fields, found in the rows: which fields a field takes along when it leads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# A dependency may have exceptions, as data that people typed in have. Repetition that is too rare proves nothing.
_HOLDS = 0.95
_LEAST_PAIRS, _LEAST_SHARE = 16, 0.1
_PROBES = 512


def with_followers(cells: Ints, *weights: Floats) -> list[Floats]:
    """The weight of each cell together with the cells that it determines, float64 [cell numbers], for each of weights.

    A field determines another if rows that are equal in it are equal in the other; that is read off some hundred pairs
    of rows. ``cells`` [rows, fields] and ``weights`` [cell numbers] as for ``group_orders``.
    """
    rows, fields = cells.shape
    heavier = [weight.copy() for weight in weights]
    for field in range(fields):
        by_value = np.argsort(cells[:, field], kind="stable")
        ordered = cells[by_value, field]
        starts = np.concatenate((np.ones(min(rows, 1), np.bool_), ordered[1:] != ordered[:-1]))
        repeats = np.flatnonzero(~starts)
        if len(repeats) < max(_LEAST_PAIRS, _LEAST_SHARE * rows):
            continue
        probes = repeats[:: max(len(repeats) // _PROBES, 1)]
        holds = (cells[by_value[probes]] == cells[by_value[probes - 1]]).mean(axis=0)
        holds[field] = 0.0
        followers = np.flatnonzero(holds >= _HOLDS)
        if len(followers):
            first = by_value[starts]
            taken_along = cells[np.ix_(first, followers)]
            for weight, own in zip(heavier, weights, strict=True):
                weight[cells[first, field]] += own[taken_along] @ holds[followers]
    return heavier
