"""Whose row is sent next: users in turn of what they have been served by their weight, a user's queries in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from spark_llm.engine.request import Request


@dataclass(slots=True)
class _User:
    """served: tokens by weight, on a scale that all users share. queries: those with rows, next one first."""

    served: float
    queries: OrderedDict[str, deque[Request]] = field(default_factory=OrderedDict)


class Turns:
    """Waiting rows. A user who comes (back) begins where the least served of those who wait stands: being away earns
    nothing (the lift of VTC, arXiv 2401.00588)."""

    def __init__(self) -> None:
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
        user.served += (len(request.prompt) + request.params.max_tokens) / request.client.weight
        if not user.queries:
            self._floor = user.served
            del self._users[name]
        self._size -= 1
        return request
