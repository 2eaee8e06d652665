"""From what clients were given over time to figures: greatest difference of service, Jain's index, percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class History:
    """Snapshots of the engine after each step. service: by weight, [snapshots, clients]. waits: rows wait."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = np.array(weights)
        self._times: list[float] = []
        self._service: list[Floats] = []
        self._waits: list[Flags] = []

    def note(self, now: float, service: Floats, waiting: npt.NDArray[np.int64]) -> None:
        self._times.append(now)
        self._service.append(service / self.weights)
        self._waits.append(waiting > 0)

    @property
    def times(self) -> Floats:
        return np.array(self._times)

    @property
    def service(self) -> Floats:
        return np.array(self._service).reshape(len(self._times), len(self.weights))

    @property
    def waits(self) -> Flags:
        return np.array(self._waits, bool).reshape(len(self._times), len(self.weights))


def greatest_difference(service: Floats, waits: Flags) -> float:
    """The greatest ``|W_f - W_g|`` of two clients over any span of time in which both wait all the time."""
    greatest = 0.0
    for f, g in combinations(range(service.shape[1]), 2):
        both = np.flatnonzero(waits[:, f] & waits[:, g])
        if len(both) < 2:
            continue
        ahead = service[both, f] - service[both, g]
        starts = np.flatnonzero(np.diff(both, prepend=-2) > 1)  # of spans without a gap
        spans = np.maximum.reduceat(ahead, starts) - np.minimum.reduceat(ahead, starts)
        greatest = max(greatest, float(spans.max()))
    return greatest


def jain(service: Floats, waits: Flags, times: Floats, windows: int = 10) -> float | None:
    """Jain's index of the service of clients that wait, the mean over windows in which two or more wait throughout.

    1: all alike; 1 / clients: one has all. None: no two clients ever waited throughout a window.
    """
    if not len(times):
        return None
    found = []
    edges = np.searchsorted(times, np.linspace(times[0], times[-1], windows + 1))
    for start, end in pairwise(edges):
        if end - start < 2:
            continue
        given = (service[end - 1] - service[start])[waits[start:end].all(axis=0)]
        if len(given) > 1 and given.any():
            found.append(float(given.sum() ** 2 / (len(given) * (given**2).sum())))
    return float(np.mean(found)) if found else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that ``share`` of the values are not above; None of none."""
    return float(np.quantile(values, share, method="inverted_cdf")) if len(values) else None


def dlpm_bound(longest_prompt: int, pool_tokens: int, quantum: float) -> float:
    """``2 (U + Q)``, U the longest prompt and, at its weight, an answer token for all that the pool holds."""
    return 2 * (longest_prompt + 2.0 * pool_tokens + quantum)
