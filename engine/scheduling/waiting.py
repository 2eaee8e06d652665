"""Orders of waiting rows: first come first served, and walks in prefix order, where who is next costs O(log waiting).

Lexicographic order of token ids is a depth-first walk of the prompts' radix tree, and taking the row that
shares most with the one admitted last is longest-prefix-first along that walk (SGLang, arXiv 2312.07104,
section 4). Pure longest-prefix-first starves rows that share nothing, so old rows come first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol

from sortedcontainers import SortedKeyList

from spark_llm.engine.cache.eviction import AT_ONCE, Upcoming, Use
from spark_llm.engine.prefix import KEY_BYTES, shared_tokens
from spark_llm.engine.scheduling.row import Row, RowState

if TYPE_CHECKING:
    from spark_llm.engine.scheduling.accounts import QueryAccount

_STRIDE = 8  # admissions between two rows that are taken because they are old


class WaitingQueue(Upcoming, Protocol):
    """Which waiting row is admitted next, and, for eviction, which later. shares: it tells clients apart."""

    shares: bool

    def __len__(self) -> int: ...

    def push(self, row: Row) -> None:
        """A row arrives."""

    def push_back(self, row: Row) -> None:
        """A preempted or rolled-back row returns; it goes before all others, of its client if those are told apart."""

    def peek(self) -> Row | None:
        """The row to admit next; the same one until something changes."""

    def take(self, row: Row) -> None:
        """A waiting row is admitted, most often the one that ``peek`` shows."""

    def remove(self, row: Row) -> None:
        """A waiting row is cancelled."""

    def price(self, row: Row, before: RowState, first: int) -> int:
        """Tokens of its prompt to charge a row for that was as ``before`` says, and got a share of a step.

        first: how many of them the share computes for the first time.
        """

    def credited(self, query: QueryAccount) -> None:
        """Something that was charged to the query has been returned to it."""

    def gone(self, query: QueryAccount) -> None:
        """The query has no rows here any more, and its account is closed."""


class Order(ABC):
    """What orders have in common: an index in prefix order, and rows that return, which go first."""

    shares = False

    def __init__(self) -> None:
        self._rows: SortedKeyList[Row] = SortedKeyList(key=prefix_order)
        self._returned: deque[Row] = deque()
        self._next: Row | None = None

    def __len__(self) -> int:
        return len(self._rows) + len(self._returned)

    def push(self, row: Row) -> None:
        self._rows.add(row)
        self._next = None

    def push_back(self, row: Row) -> None:
        self._returned.appendleft(row)
        self._next = None

    def peek(self) -> Row | None:
        if self._next is None:
            if self._returned:
                self._next = self._returned[0]
            elif self._rows:
                self._next = self._choose()
        return self._next

    def take(self, row: Row) -> None:
        self.remove(row)

    def remove(self, row: Row) -> None:
        if self._returned and row in self._returned:
            self._returned.remove(row)
        else:
            self._rows.remove(row)
        self._next = None

    def price(self, row: Row, before: RowState, first: int) -> int:
        return first

    def credited(self, query: QueryAccount) -> None:  # noqa: B027 (an order knows no clients)
        pass

    def gone(self, query: QueryAccount) -> None:  # noqa: B027
        pass

    def next_use(self, path: bytes, beyond: int) -> tuple[int, Use] | None:
        """See Upcoming. Ageing, which may call a row earlier than its walk, is ignored."""
        start = path[: KEY_BYTES * (beyond + 1)]
        shared = max((shared_tokens(row.key, path) for row in self._returned if row.key.startswith(start)), default=0)
        if shared == len(path) // KEY_BYTES:
            return shared, AT_ONCE
        longest, first = longest_start(self._rows, path, beyond)
        if first is not None:
            return longest, self.when(first, path)
        shared = max(shared, longest)
        return (shared, AT_ONCE) if shared > beyond else None

    @abstractmethod
    def when(self, first: Row, path: bytes) -> Use:
        """When a row that begins with ``path`` is admitted; ``first`` is the first such row in prefix order."""

    @abstractmethod
    def _choose(self) -> Row:
        """The row to admit next, of at least one."""


class FirstComeFirstServed(Order):
    """In the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        # Not a dict: to find the first entry of a dict costs as much as entries before it were deleted.
        self._arrivals: OrderedDict[Row, None] = OrderedDict()

    def push(self, row: Row) -> None:
        super().push(row)
        self._arrivals[row] = None

    def remove(self, row: Row) -> None:
        super().remove(row)
        self._arrivals.pop(row, None)

    def when(self, first: Row, path: bytes) -> Use:
        return 0, b"", first.sequence

    def _choose(self) -> Row:
        return next(iter(self._arrivals))


class DepthFirst(Order):
    """Walks the prompts' radix tree depth first, again and again; who comes behind the walk waits for its next lap."""

    def __init__(self) -> None:
        super().__init__()
        self._cursor = b""
        self._lap = 0  # how often the walk began anew
        self._begins_anew = False  # the walk, with the next row

    def take(self, row: Row) -> None:
        self._lap += self._begins_anew and row is self._next
        super().take(row)
        self._cursor = row.key

    def when(self, first: Row, path: bytes) -> Use:
        if self._cursor.startswith(path):  # the walk is among them
            return self._lap, self._cursor, -1
        return self._lap + (first.key < self._cursor), first.key, first.sequence

    def _choose(self) -> Row:
        at = self._rows.bisect_key_left((self._cursor, -1))
        self._begins_anew = at == len(self._rows)
        row: Row = self._rows[0 if self._begins_anew else at]
        return row


class LongestPrefixFirst(DepthFirst):
    """Longest prefix first with ageing.

    patience: a row is overtaken by at most ``patience + 10 * most + 8`` rows that came after it, most being the
    most rows that waited at once since the queue was last empty. Of these, 2 * most let a walk over all rows end
    first, and 8 * most keep eight of nine admissions for the walk even where many rows are due: their
    prefixes, too, are to be read once.
    """

    def __init__(self, patience: int = 1024) -> None:
        super().__init__()
        self.patience = patience
        # sequence -> row, number of rows that came before it; oldest first. Not a dict, as above.
        self._arrivals: OrderedDict[int, tuple[Row, int]] = OrderedDict()
        self._arrived = self._departed = self._most = 0
        self._oldest_left = 0  # rows that had departed when the oldest one last did

    def push(self, row: Row) -> None:
        super().push(row)
        self._arrivals[row.sequence] = (row, self._arrived)
        self._arrived += 1
        self._most = max(self._most, len(self._rows)) if len(self._rows) > 1 else 1

    def remove(self, row: Row) -> None:
        super().remove(row)
        if row.sequence in self._arrivals:
            self._departed += 1
            if row.sequence == next(iter(self._arrivals)):
                self._oldest_left = self._departed
            del self._arrivals[row.sequence]

    def _choose(self) -> Row:
        self._begins_anew = False
        oldest, came_before = next(iter(self._arrivals.values()))
        due = came_before + self.patience + 2 * self._most  # departures
        if self._departed >= max(due, self._oldest_left + _STRIDE):
            return oldest
        row, self._begins_anew = nearest(self._rows, self._cursor)
        return row


def prefix_order(row: Row) -> tuple[bytes, int]:
    """The key of rows in prefix order."""
    return row.key, row.sequence


def nearest(rows: SortedKeyList[Row], cursor: bytes) -> tuple[Row, bool]:
    """The row that shares most tokens with ``cursor``, of equal ones the next in prefix order.

    True: there was none after the cursor, and the row is the first of all.
    """
    at = rows.bisect_key_left((cursor, -1))
    after: Row = rows[at if at < len(rows) else 0]
    before: Row = rows[at - 1] if at else after
    shared = KEY_BYTES * shared_tokens(after.key, cursor)
    if shared < len(cursor) and before.key.startswith(cursor[: shared + KEY_BYTES]):
        return before, False
    return after, at == len(rows)


def longest_start(rows: SortedKeyList[Row], path: bytes, beyond: int) -> tuple[int, Row | None]:
    """How many leading tokens of ``path`` a row begins with, at most (0: not more than ``beyond``).

    The first row in prefix order that begins with the whole path, if there is one.
    """
    at = rows.bisect_key_left((path, -1))
    after = rows[at] if at < len(rows) else None
    if after is not None and after.key.startswith(path):
        return len(path) // KEY_BYTES, after
    start, shared = path[: KEY_BYTES * (beyond + 1)], 0
    for row in (after, rows[at - 1] if at else None):
        if row is not None and row.key.startswith(start):
            shared = max(shared, shared_tokens(row.key, path))
    return shared, None
