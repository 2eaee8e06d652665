"""Waiting rows in prefix order: who is next costs O(log waiting), however many wait.

Lexicographic order of token ids is a depth-first walk of the prompts' radix tree, and taking the row that
shares most with the one admitted last is longest-prefix-first along that walk (SGLang, arXiv 2312.07104,
section 4). Pure longest-prefix-first starves rows that share nothing, so old rows come first.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from sortedcontainers import SortedKeyList

from spark_llm.engine.scheduling.row import Row


class WaitingQueue(Protocol):
    """An order policy: which waiting row is admitted next."""

    def __len__(self) -> int: ...

    def push(self, row: Row) -> None:
        """A row arrives."""

    def push_back(self, row: Row) -> None:
        """A preempted or rolled-back row returns; it goes before all others."""

    def peek(self) -> Row | None:
        """The row to admit next; the same one until ``pop`` or ``push_back``."""

    def pop(self) -> Row:
        """Take the row that ``peek`` shows."""

    def remove(self, row: Row) -> None:
        """A waiting row is cancelled."""


class LongestPrefixFirst:
    """Longest prefix first with ageing.

    patience: a row is overtaken by at most ``patience + 2 * (rows waiting when it came)`` admissions.
    """

    def __init__(self, patience: int = 1024) -> None:
        self.patience = patience
        self._rows: SortedKeyList[Row] = SortedKeyList(key=_order)
        self._arrivals: dict[int, tuple[Row, int]] = {}  # sequence -> row, admission number that is its turn
        self._returned: deque[Row] = deque()
        self._cursor = b""
        self._admissions = 0
        self._next: Row | None = None

    def __len__(self) -> int:
        return len(self._rows) + len(self._returned)

    def push(self, row: Row) -> None:
        self._arrivals[row.sequence] = (row, self._admissions + self.patience + 2 * len(self._rows))
        self._rows.add(row)
        self._next = None

    def push_back(self, row: Row) -> None:
        self._returned.appendleft(row)
        self._next = None

    def peek(self) -> Row | None:
        if self._next is None:
            self._next = self._choose()
        return self._next

    def pop(self) -> Row:
        row = self.peek()
        if row is None:
            raise IndexError("pop from an empty queue")
        self.remove(row)
        self._cursor = row.key
        self._admissions += 1
        return row

    def remove(self, row: Row) -> None:
        if row.sequence in self._arrivals:
            del self._arrivals[row.sequence]
            self._rows.remove(row)
        else:
            self._returned.remove(row)
        self._next = None

    def _choose(self) -> Row | None:
        if self._returned:
            return self._returned[0]
        if not self._rows:
            return None
        oldest, turn = next(iter(self._arrivals.values()))
        if self._admissions >= turn:
            return oldest
        at = self._rows.bisect_key_left((self._cursor, -1))
        after: Row = self._rows[at if at < len(self._rows) else 0]  # past the end: begin anew
        before: Row = self._rows[at - 1] if at else after
        return before if _shared(before.key, self._cursor) > _shared(after.key, self._cursor) else after


def _order(row: Row) -> tuple[bytes, int]:
    return row.key, row.sequence


def _shared(a: bytes, b: bytes) -> int:
    """Number of leading tokens that two keys share."""
    length = min(len(a), len(b))
    differs = np.frombuffer(a, np.uint32, length // 4) != np.frombuffer(b, np.uint32, length // 4)
    return int(differs.argmax()) if differs.any() else length // 4
