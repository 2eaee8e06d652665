"""The best single field order for all rows of a table, found by moving fields while more is shared."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.expected import Prefix, Sample

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Which prefixes repeat depends on the set of their fields only, so what was counted serves many orders. This bounds
# how many sets are counted, over how many rows, before the best order so far is taken.
_MAX_ROWS = 10_000
_BUDGET, _BUDGET_A_FIELD = 250, 10
# Once so many prefixes are unlike all others, no order of the remaining fields shares anything.
_ALL_DISTINCT = 0.98
_BEYOND = 5
_ENOUGH = 1e-6


def best_fixed_order(sample: Sample, starts: Iterable[Ints], budget: int | None = None) -> Ints:
    """A field order, int64 [fields], under which no move of one field shares more; the best of those found from
    ``starts``, or of what was found within ``budget`` countings for each."""
    if budget is None:
        budget = max(_BUDGET, _BUDGET_A_FIELD * sample.cells.shape[1])
    sample, _ = sample.at_most(_MAX_ROWS)
    climb = _Climb(sample)
    found = [climb.climb(start.tolist(), budget * number) for number, start in enumerate(starts, start=1)]
    return np.array(max(found, key=lambda one: one[0])[1], np.int64)


class _Climb:
    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.prefixes = {0: Prefix.empty(len(sample.cells))}  # by bit mask of fields
        self.found: dict[int, Floats] = {}
        self.total = max(float(sample.lengths.sum()), 1e-300)

    def hits(self, order: list[int]) -> tuple[float, int]:
        """The share that ``order`` finds, and at how many fields all prefixes are distinct."""
        sample, fields, found = self.sample, 0, 0.0
        for place, field in enumerate(order):
            before, fields = fields, fields | 1 << field
            prefix = self.prefixes.get(fields)
            if prefix is None:
                prefix = self.prefixes[before].longer(sample.cells[:, field], sample.total_rows)
                self.prefixes[fields] = prefix
                self.found[fields] = prefix.found(sample.total_rows)
            found += float(sample.lengths[:, field] @ self.found[fields])
            if prefix.share >= _ALL_DISTINCT:
                return found / self.total, place + 1
        return found / self.total, len(order)

    def climb(self, order: list[int], budget: int) -> tuple[float, list[int]]:
        """Move one field further to the front as long as that shares more."""
        most, end = self.hits(order)
        moved = True
        while moved:
            moved = False
            for source in range(1, min(end + _BEYOND, len(order))):
                for target in range(min(source, end)):
                    if len(self.prefixes) > budget:
                        return most, order
                    other = [*order[:target], order[source], *order[target:source], *order[source + 1 :]]
                    found, other_end = self.hits(other)
                    if found > most + _ENOUGH:
                        most, end, order, moved = found, other_end, other, True
        return most, order
