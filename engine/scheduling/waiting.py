"""Waiting rows in prefix order: who is next costs O(log waiting), however many wait.

Lexicographic order of token ids is a depth-first walk of the prompts' radix tree, and taking the row that
shares most with the one admitted last is longest-prefix-first along that walk (SGLang, arXiv 2312.07104,
section 4). Pure longest-prefix-first starves rows that share nothing, so old rows come first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Protocol

from sortedcontainers import SortedKeyList

from spark_llm.engine.cache.eviction import AT_ONCE, Upcoming, Use
from spark_llm.engine.prefix import KEY_BYTES, shared_tokens
from spark_llm.engine.scheduling.row import Row

_STRIDE = 8  # admissions between two rows that are taken because they are old


class WaitingQueue(Upcoming, Protocol):
    """An order policy: which waiting row is admitted next, and, for eviction, which later."""

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

    patience: a row is overtaken by at most ``patience + 10 * most + 8`` rows that came after it, most being the
    most rows that waited at once since the queue was last empty. Of these, 2 * most let a walk over all rows end
    first, and 8 * most keep eight of nine admissions for the walk even where many rows are due: their
    prefixes, too, are to be read once.
    """

    def __init__(self, patience: int = 1024) -> None:
        self.patience = patience
        self._rows: SortedKeyList[Row] = SortedKeyList(key=_order)
        # sequence -> row, number of rows that came before it; oldest first. Not a dict: to find the first entry
        # of a dict costs as much as entries before it were deleted.
        self._arrivals: OrderedDict[int, tuple[Row, int]] = OrderedDict()
        self._returned: deque[Row] = deque()
        self._cursor = b""
        self._arrived = self._departed = self._most = 0
        self._oldest_left = 0  # rows that had departed when the oldest one last did
        self._next: Row | None = None
        self._lap = 0  # how often the walk began anew
        self._begins_anew = False  # the walk, with the next row

    def __len__(self) -> int:
        return len(self._rows) + len(self._returned)

    def push(self, row: Row) -> None:
        self._arrivals[row.sequence] = (row, self._arrived)
        self._arrived += 1
        self._rows.add(row)
        self._most = max(self._most, len(self._rows)) if len(self._rows) > 1 else 1
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
        self._lap += self._begins_anew
        self.remove(row)
        self._cursor = row.key
        return row

    def remove(self, row: Row) -> None:
        if row.sequence in self._arrivals:
            self._departed += 1
            if row.sequence == next(iter(self._arrivals)):
                self._oldest_left = self._departed
            del self._arrivals[row.sequence]
            self._rows.remove(row)
        else:
            self._returned.remove(row)
        self._next = None

    def next_use(self, path: bytes, beyond: int) -> tuple[int, Use] | None:
        """See Upcoming. Later is a row that comes later in the walk; ageing, which may call it earlier, is ignored."""
        start = path[: KEY_BYTES * (beyond + 1)]
        shared = max((shared_tokens(row.key, path) for row in self._returned if row.key.startswith(start)), default=0)
        if shared == len(path) // KEY_BYTES:
            return shared, AT_ONCE
        at = self._rows.bisect_key_left((path, -1))
        first = self._rows[at] if at < len(self._rows) else None
        if first is not None and first.key.startswith(path):
            return len(path) // KEY_BYTES, self._use(first, path)
        for row in (first, self._rows[at - 1] if at else None):
            if row is not None and row.key.startswith(start):
                shared = max(shared, shared_tokens(row.key, path))
        return (shared, AT_ONCE) if shared > beyond else None

    def _use(self, first: Row, path: bytes) -> Use:
        """When the first of the rows that begin with ``path`` is admitted; ``first`` is the first one by its key."""
        if self._cursor.startswith(path):  # the walk is among them
            return self._lap, self._cursor, -1
        return self._lap + (first.key < self._cursor), first.key, first.sequence

    def _choose(self) -> Row | None:
        self._begins_anew = False
        if self._returned:
            return self._returned[0]
        if not self._rows:
            return None
        oldest, came_before = next(iter(self._arrivals.values()))
        due = came_before + self.patience + 2 * self._most  # departures
        if self._departed >= max(due, self._oldest_left + _STRIDE):
            return oldest
        at = self._rows.bisect_key_left((self._cursor, -1))
        after: Row = self._rows[at if at < len(self._rows) else 0]  # past the end: begin anew
        before: Row = self._rows[at - 1] if at else after
        shared = KEY_BYTES * shared_tokens(after.key, self._cursor)
        if shared < len(self._cursor) and before.key.startswith(self._cursor[: shared + KEY_BYTES]):
            return before
        self._begins_anew = at == len(self._rows)
        return after


def _order(row: Row) -> tuple[bytes, int]:
    return row.key, row.sequence
