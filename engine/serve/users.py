"""The ``user`` of a request as scheduling knows it: a query of its API key's holder, one of not too many.

Users are what a client says they are. So they share what their holder gets, and however many there are, with names
however long, what is kept of them does not grow.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spark_llm.engine.request import Client

MOST_USERS = 1024  # of one holder that are told apart


@dataclass(slots=True, eq=False)
class _Place:
    """asking: requests that are open."""

    name: str
    asking: int = 0


class Users:
    """Places for the users of each holder; who asked least lately makes way for a new one. For one event loop."""

    def __init__(self, most: int = MOST_USERS) -> None:
        self._most = most
        self._places: dict[str, OrderedDict[bytes, _Place]] = {}

    @contextmanager
    def asking(self, holder: str, user: str | None) -> Iterator[Client]:
        """Whom a request is charged to while it is open. Where all places have open requests, a new user shares one."""
        if not user:
            yield Client(holder)
            return
        place = self._place(self._places.setdefault(holder, OrderedDict()), user)
        place.asking += 1
        try:
            yield Client(holder, place.name)
        finally:
            place.asking -= 1

    def _place(self, places: OrderedDict[bytes, _Place], user: str) -> _Place:
        key = hashlib.blake2b(user.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in places:
            places.move_to_end(key)
            return places[key]
        if len(places) < self._most:
            place = _Place(f"user-{len(places)}")
        else:
            oldest = next((name for name, each in places.items() if not each.asking), None)
            if oldest is None:
                return next(iter(places.values()))
            place = places.pop(oldest)
        places[key] = place
        return place
