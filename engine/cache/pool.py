"""The free list of K/V pages. It knows page numbers only: who owns a page is the caller's business."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int32]


class PagePool:
    """``total`` pages, numbered from 0; a stack, so that pages freed last are used first (warm caches)."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._stack: Pages = np.arange(total - 1, -1, -1, dtype=np.int32)
        self._free = total
        self._is_free = np.ones(total, dtype=np.bool_)
        self._place = np.empty(total, dtype=np.int32)  # of a page among those that are being released

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return self._free

    def allocate(self, count: int) -> Pages:
        """``count`` pages; the caller has checked ``free``."""
        if count > self._free:
            raise ValueError(f"allocate({count}) with {self._free} free pages")
        self._free -= count
        pages = self._stack[self._free : self._free + count][::-1].copy()
        self._is_free[pages] = False
        return pages

    def release(self, pages: Pages) -> None:
        """Give pages back. A page given back twice is a broken engine: ValueError, nothing changes."""
        count = len(pages)
        if not count:
            return
        places = np.arange(count, dtype=np.int32)
        self._place[pages] = places
        if self._is_free[pages].any() or (self._place[pages] != places).any():
            raise ValueError(f"pages freed twice: {pages[self._is_free[pages]].tolist() or pages.tolist()}")
        self._is_free[pages] = True
        self._stack[self._free : self._free + count] = pages[::-1]
        self._free += count

    def is_free(self, pages: Pages) -> npt.NDArray[np.bool_]:
        """For each page whether nobody owns it."""
        return self._is_free[pages]
