"""Waiting rows by client: who is next is decided among users, then among the user's queries, then among its rows.

Each query's rows have an order of their own, and queries and users show one row each, their next. So the choice costs
O(log clients + log waiting), and a user with a hundred queries has one share. A query whose rows alone wait takes what
it likes: nobody has to be told apart, and what it took then is settled when that ends.
"""

from __future__ import annotations

from collections.abc import Callable

from sortedcontainers import SortedKeyList

from spark_llm.engine.cache.eviction import AT_ONCE, Use
from spark_llm.engine.prefix import KEY_BYTES, shared_tokens
from spark_llm.engine.scheduling.accounts import QueryAccount, UserAccount
from spark_llm.engine.scheduling.row import Row, RowState
from spark_llm.engine.scheduling.sharing import Sharing
from spark_llm.engine.scheduling.waiting import Order, longest_start, prefix_order


class FairQueue:
    """A WaitingQueue in which clients share the engine.

    sharing: makes an admission filter, one among users and one among the queries of each. order: makes an order of the
    rows of one query.
    """

    shares = True

    def __init__(self, sharing: Callable[[], Sharing], order: Callable[[], Order]) -> None:
        self._new_sharing = sharing
        self._new_order = order
        self._users = sharing()
        self._count = 0
        self._alone: QueryAccount | None = None  # the query that all waiting rows are of
        self._taken: Row | None = None  # the last one since it has been alone
        # For eviction, which asks about all rows: those of the first query (one alone needs no index but its order's),
        # and all others.
        self._first: QueryAccount | None = None
        self._others: SortedKeyList[Row] = SortedKeyList(key=prefix_order)
        self._returned: dict[Row, None] = {}  # others, that go first

    def __len__(self) -> int:
        return self._count

    def push(self, row: Row) -> None:
        alone = self._alone
        if alone is not None and row.account is alone:
            assert alone.order is not None
            alone.order.push(row)
            self._count += 1
            return
        query, order = self._begin(row)
        order.push(row)
        if query is not self._first:
            self._others.add(row)
        self._came(query, order)

    def push_back(self, row: Row) -> None:
        query, order = self._begin(row)
        order.push_back(row)
        if query is not self._first:
            self._returned[row] = None
        self._came(query, order)

    def peek(self) -> Row | None:
        if self._alone is not None:
            return self._alone.peek()
        return self._users.pick().peek() if self._count else None

    def take(self, row: Row) -> None:
        query, order, sharing = _places(row)
        order.take(row)
        if query is self._alone:
            self._taken = row
            if self._count > 1:
                self._count -= 1
                return
        else:
            sharing.taken(row)
            self._users.taken(row)
        self._left(row, query, order, sharing)

    def remove(self, row: Row) -> None:
        query, order, sharing = _places(row)
        order.remove(row)
        self._left(row, query, order, sharing)

    def price(self, row: Row, before: RowState, first: int) -> int:
        return self._users.price(row, before, first)

    def credited(self, query: QueryAccount) -> None:
        if query.order is not None and len(query.order):
            assert query.user.sharing is not None
            query.user.sharing.change(query)
        if query.user.sharing is not None and len(query.user.sharing):
            self._users.change(query.user)

    def gone(self, query: QueryAccount) -> None:
        user = query.user
        if query is self._first:
            self._first = None
        assert user.sharing is not None
        user.sharing.gone(query)
        if not user.queries:
            self._users.gone(user)

    def next_use(self, path: bytes, beyond: int) -> tuple[int, Use] | None:
        """See Upcoming. Laps of different queries are compared as if all walks had begun at once: a guess."""
        mine = None
        if self._first is not None and self._first.order is not None:
            mine = self._first.order.next_use(path, beyond)
            if not self._others and not self._returned:
                return mine
        start, whole = path[: KEY_BYTES * (beyond + 1)], len(path) // KEY_BYTES
        shared = max((shared_tokens(row.key, path) for row in self._returned if row.key.startswith(start)), default=0)
        longest, first = longest_start(self._others, path, beyond)
        if shared == whole:
            return whole, AT_ONCE
        if first is not None:
            use = _places(first)[1].when(first, path)
            return whole, min(use, mine[1]) if mine is not None and mine[0] == whole else use
        shared = max(shared, longest)
        if mine is not None and mine[0] >= shared:
            return mine
        return (shared, AT_ONCE) if shared > beyond else None

    def _begin(self, row: Row) -> tuple[QueryAccount, Order]:
        """The row's query, which has what it needs to wait here."""
        query = row.account
        assert query is not None
        user = query.user
        if user.sharing is None:
            user.sharing = self._new_sharing()
            self._users.begin(user)
        if query.order is None:
            query.order = self._new_order()
            user.sharing.begin(query)
            if self._first is None:
                self._first = query
        return query, query.order

    def _came(self, query: QueryAccount, order: Order) -> None:
        self._count += 1
        user = query.user
        assert user.sharing is not None
        if len(order) > 1:
            user.sharing.change(query)
            self._users.change(user)
            return
        self._end_alone()
        user.sharing.enter(query)
        if len(user.sharing) > 1:
            self._users.change(user)
        else:
            self._users.enter(user)
        self._begin_alone()

    def _left(self, row: Row, query: QueryAccount, order: Order, sharing: Sharing) -> None:
        self._count -= 1
        if query is not self._first:
            if row in self._returned:
                del self._returned[row]
            else:
                self._others.remove(row)
        if len(order):
            sharing.change(query)
            self._users.change(query.user)
            return
        self._end_alone()
        sharing.leave(query)
        if len(sharing):
            self._users.change(query.user)
        else:
            self._users.leave(query.user)
        self._begin_alone()

    def _begin_alone(self) -> None:
        """Where one query is left, or the first that came, nothing is kept but the order of its rows."""
        user = self._users.lone
        if user is None:
            return
        assert isinstance(user, UserAccount)
        assert user.sharing is not None
        query = user.sharing.lone
        if query is None:
            return
        assert isinstance(query, QueryAccount)
        self._alone = query
        if query is not self._first:
            self._first = query
            self._others.clear()
            self._returned.clear()

    def _end_alone(self) -> None:
        """What the query took while it was alone is paid by the quanta that it would have been given meanwhile."""
        row, self._taken, self._alone = self._taken, None, None
        if row is None:
            return
        sharing = _places(row)[2]
        for level in (self._users, sharing):
            level.pick()
            level.taken(row)


def _places(row: Row) -> tuple[QueryAccount, Order, Sharing]:
    query = row.account
    assert query is not None
    assert query.order is not None
    assert query.user.sharing is not None
    return query, query.order, query.user.sharing
