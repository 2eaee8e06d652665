"""Row order inside one window: prefix order. Fields are never reordered here.

Lexicographic order of the segments is a depth-first walk of their radix tree: rows that share leading
segments stand together, so a prefix cache computes each shared prefix once (Liu et al., arXiv 2403.05821).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def prefix_order(codes: npt.NDArray[np.integer]) -> Ints:
    """The rows of a window in prefix order, int64 [rows]; equal rows keep their order.

    codes: [rows, segments], whose numbers compare as the segments' texts do.
    """
    if not codes.shape[1]:
        return np.arange(len(codes))
    # lexsort takes the most important key last.
    return np.lexsort(codes.T[::-1]).astype(np.int64)
