"""Whose row is sent next: users in turn of what they have been served by their weight, a user's queries in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from spark_llm.engine.request import Request
from spark_llm.engine.scheduling.accounts import Service


def asked_tokens(request: Request) -> int:
    """Most tokens of a prompt and its answer."""
    return len(request.prompt) + request.params.max_tokens


@dataclass(slots=True)
class _User:
    """served: tokens by weight, on a scale that all users share. weight: of the row that came last. queries: those with
    rows, next one first."""

    served: float
    weight: float = 1.0
    queries: OrderedDict[str, deque[Request]] = field(default_factory=OrderedDict)


class Turns:
    """Waiting rows. A user who comes (back) begins where the least served of those who wait stands: being away earns
    nothing (the lift of VTC, arXiv 2401.00588). cost: tokens that a row is charged for."""

    def __init__(self, cost: Callable[[Request], int] = asked_tokens) -> None:
        self._cost = cost
        self._users: dict[str, _User] = {}
        self._floor = 0.0  # what the user who went last was served
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Request) -> None:
        """A row arrives."""
        client = request.client
        user = self._users.get(client.user)
        if user is None:
            least = min((waiting.served for waiting in self._users.values()), default=self._floor)
            user = self._users[client.user] = _User(least)
        user.weight = client.weight
        user.queries.setdefault(client.query, deque()).append(request)
        self._size += 1

    def pop(self) -> Request:
        """The row whose turn it is; there must be one."""
        name, user = min(self._users.items(), key=lambda item: item[1].served)
        query, rows = next(iter(user.queries.items()))
        request = rows.popleft()
        user.queries.move_to_end(query)
        if not rows:
            del user.queries[query]
        user.served += self._cost(request) / request.client.weight
        if not user.queries:
            self._floor = user.served
            del self._users[name]
        self._size -= 1
        return request

    def drop(self, ids: Collection[int]) -> None:
        """Forgets rows, which are not charged for."""
        for name, user in list(self._users.items()):
            for query, rows in list(user.queries.items()):
                kept = deque(request for request in rows if request.id not in ids)
                self._size -= len(rows) - len(kept)
                user.queries[query] = kept
                if not kept:
                    del user.queries[query]
            if not user.queries:
                self._floor = max(self._floor, user.served)
                del self._users[name]

    def clients(self) -> dict[str, Service]:
        """Users with waiting rows: tokens they were given since they came, on the scale by weight, and their rows."""
        return {
            name: Service(user.served * user.weight, user.weight, sum(map(len, user.queries.values())), 0)
            for name, user in self._users.items()
        }
