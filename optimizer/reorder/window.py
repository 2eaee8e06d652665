"""Row order inside one window: equal rows folded, the rest in prefix order. Fields are never reordered here.

Lexicographic order of the segments is a depth-first walk of their radix tree: rows that share leading
segments stand together, so a prefix cache computes each shared prefix once (Liu et al.).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class WindowOrder(NamedTuple):
    """``order``: int64 [calls], the rows to ask, in prefix order. ``call``: int64 [rows], for each row the
    position in ``order`` of the call that answers it."""

    order: Ints
    call: Ints


def prefix_order(codes: npt.NDArray[np.integer], fold: bool = True) -> WindowOrder:
    """Order a window of ``codes`` [rows, segments], whose numbers compare as the segments' texts do.

    With ``fold``, equal rows share one call: that of the first of them. Without, every row is a call of its
    own, and equal rows keep their order.
    """
    rows = len(codes)
    # lexsort takes the most important key last; it is stable, so a group's first row is its earliest.
    by_prefix = np.lexsort(codes.T[::-1]) if codes.shape[1] else np.arange(rows)
    starts = np.ones(rows, np.bool_)
    if fold and rows:
        ordered = codes[by_prefix]
        starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    call = np.empty(rows, np.int64)
    call[by_prefix] = np.cumsum(starts) - 1
    return WindowOrder(by_prefix[starts].astype(np.int64), call)
