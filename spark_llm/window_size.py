"""How many rows a window may have, by how large answers turn out to be: a task holds those of some six windows."""

from __future__ import annotations

WINDOW_BYTES = 10 << 20  # of a window's answers, about: 2,200 vectors of 384 numbers
FIRST_ROWS = 256  # of windows of vectors while their width is not known, which may be 50 kB
_LEAST_ROWS = 16


class WindowSize:
    """Of one call of a task. most: rows of any window. is_large: answers may be large, each like the others."""

    def __init__(self, most: int, is_large: bool) -> None:
        self._first = min(most, FIRST_ROWS) if is_large else most
        self._most = most
        self._answers = 0
        self._bytes = 0

    def told(self, text: str | None) -> None:
        """An answer came."""
        if text is not None:
            self._answers += 1
            self._bytes += len(text)

    @property
    def rows(self) -> int:
        """The most rows of the next window."""
        if not self._answers:
            return self._first
        return min(self._most, max(_LEAST_ROWS, WINDOW_BYTES * self._answers // max(1, self._bytes)))
