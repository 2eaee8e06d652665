"""What clients were given: an account for each user, and below it one for each of the user's queries.

Users are told apart by name, queries by name within their user. What a client may still be given is decided elsewhere
(sharing.py); here is what that is decided from. Tokens of answers are charged for all running rows of a step at once,
in arrays; an account takes in what was charged to it (``collect``) when somebody looks at it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from spark_llm.engine.request import Client

if TYPE_CHECKING:
    from spark_llm.engine.scheduling.row import Row
    from spark_llm.engine.scheduling.sharing import Sharing
    from spark_llm.engine.scheduling.waiting import Order

Slots = npt.NDArray[np.int32]


class Service(NamedTuple):
    """What a user has been given, in weighted tokens (see charging.py), with which weight, and its rows now."""

    tokens: float
    weight: float
    waiting: int
    running: int


class Account(ABC):
    """A user or a query, as long as it has rows here.

    service: weighted tokens charged, less those returned. balance: how much more it may be given, by weight, before
    others are due; its Sharing says how. rows: waiting or running. head, round, due: its Sharing's.
    """

    __slots__ = ("accounts", "balance", "due", "head", "name", "round", "rows", "running", "service", "slot", "weight")

    def __init__(self, accounts: Accounts, name: str, weight: float) -> None:
        self.accounts = accounts
        self.name = name
        self.weight = weight
        self.slot = -1
        self.service = self.balance = 0.0
        self.rows = self.running = 0
        self.head: Row | None = None
        self.round = 0
        self.due: float = 0

    def collect(self) -> None:
        """Take in what was charged by arrays."""
        pending = self.accounts.pending.item(self.slot)
        if pending:
            self.accounts.pending[self.slot] = 0.0
            self.charge(pending)

    def charge(self, tokens: float) -> None:
        """Charge weighted tokens; below 0: return them."""
        self.service += tokens
        self.balance -= tokens / self.weight

    @abstractmethod
    def peek(self) -> Row:
        """The row of it that is to be admitted next; one waits."""


class UserAccount(Account):
    """sharing: how its queries share what it gets; None: nobody asks for that."""

    __slots__ = ("queries", "sharing")

    def __init__(self, accounts: Accounts, name: str, weight: float) -> None:
        super().__init__(accounts, name, weight)
        self.queries: dict[str, QueryAccount] = {}
        self.sharing: Sharing | None = None

    def peek(self) -> Row:
        assert self.sharing is not None
        return self.sharing.pick().peek()


class QueryAccount(Account):
    """order: its waiting rows; None: they wait elsewhere. left_at: step when the last one of its rows left."""

    __slots__ = ("left_at", "order", "user")

    def __init__(self, user: UserAccount, name: str) -> None:
        super().__init__(user.accounts, name, 1.0)
        self.user = user
        self.order: Order | None = None
        self.left_at = -1

    def peek(self) -> Row:
        assert self.order is not None
        row = self.order.peek()
        assert row is not None
        return row


class Accounts:
    """Every client with rows in the engine. pending: float64, by slot: what was charged and not collected."""

    def __init__(self) -> None:
        self.users: dict[str, UserAccount] = {}
        self.pending = np.zeros(16)
        self._user_of: Slots = np.zeros(16, np.int32)  # slot of a query -> slot of its user
        self._by_slot: list[Account | None] = [None] * 16
        self._free = list(range(15, -1, -1))
        self._queries = 0
        self._idle: deque[tuple[int, QueryAccount]] = deque()  # step when its last row left

    def open(self, client: Client) -> QueryAccount:
        """A row of the client arrives."""
        user = self.users.get(client.user)
        if user is None:
            user = self.users[client.user] = UserAccount(self, client.user, client.weight)
            self._enter(user)
        user.weight = client.weight
        query = user.queries.get(client.query)
        if query is None:
            query = user.queries[client.query] = QueryAccount(user, client.query)
            self._enter(query)
            self._user_of[query.slot] = user.slot
            self._queries += 1
        query.rows += 1
        user.rows += 1
        return query

    def close(self, query: QueryAccount, step: int) -> None:
        """A row of the query has left; steps up to ``step`` may still have charged for it."""
        query.rows -= 1
        query.user.rows -= 1
        if not query.rows:
            query.left_at = step
            self._idle.append((step, query))

    def sweep(self, oldest: int) -> Iterator[QueryAccount]:
        """Forget clients without rows that no step from ``oldest`` on is about: their queries, one after the other."""
        while self._idle and self._idle[0][0] < oldest:
            _, query = self._idle.popleft()
            user = query.user
            if query.rows or query.left_at >= oldest or user.queries.get(query.name) is not query:
                continue  # it came again; where it is gone again, a later entry says so
            query.collect()
            del user.queries[query.name]
            self._leave(query)
            self._queries -= 1
            if not user.queries:
                user.collect()
                del self.users[user.name]
                self._leave(user)
            yield query

    def charge(self, query: QueryAccount, tokens: float) -> None:
        """Charge the query and its user for one row; below 0: return it."""
        user = query.user
        query.service += tokens  # not by Account.charge: for each row that is admitted
        query.balance -= tokens  # of weight 1
        user.service += tokens
        user.balance -= tokens / user.weight

    def charge_each(self, slots: Slots, tokens: float) -> None:
        """Charge ``tokens`` for each of ``slots``, those of the rows' queries."""
        if self._queries == 1:
            slot = slots[0]
            self.pending[[slot, self._user_of[slot]]] += tokens * len(slots)
            return
        counts = np.bincount(slots, minlength=len(self.pending))
        counts += np.bincount(self._user_of[slots], minlength=len(self.pending))
        self.pending += tokens * counts

    def queries_of(self, slots: Slots) -> list[QueryAccount]:
        """The queries that have rows in ``slots``, each once."""
        found = [self._by_slot[slot] for slot in np.unique(slots).tolist()]
        return [query for query in found if isinstance(query, QueryAccount)]

    def status(self) -> dict[str, Service]:
        """What each user with rows here has been given."""
        for user in self.users.values():
            user.collect()
        return {
            name: Service(user.service, user.weight, user.rows - user.running, user.running)
            for name, user in self.users.items()
        }

    def _enter(self, account: Account) -> None:
        if not self._free:
            size = len(self.pending)
            self.pending = np.concatenate([self.pending, np.zeros(size)])
            self._user_of = np.concatenate([self._user_of, np.zeros(size, np.int32)])
            self._by_slot += [None] * size
            self._free = list(range(2 * size - 1, size - 1, -1))
        account.slot = self._free.pop()
        self._by_slot[account.slot] = account

    def _leave(self, account: Account) -> None:
        self._by_slot[account.slot] = None
        self.pending[account.slot] = 0.0
        self._free.append(account.slot)
