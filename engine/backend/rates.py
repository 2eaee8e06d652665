"""Requests and tokens a minute: who is early waits until what was taken has come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_MINUTE = 60.0


class Bucket:
    """Gives ``per_minute`` units a minute, in turn of asking; at most ``burst`` seconds' worth at once.

    per_minute 0: no limit. A request for more than the bucket holds leaves it in debt, which those behind it wait out.
    """

    def __init__(self, per_minute: float, burst: float = 6.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / _MINUTE
        self._capacity = max(1.0, self._rate * burst)
        self._clock = clock
        self._level = self._capacity
        self._at = clock()

    def take(self, units: float) -> float:
        """Takes units; seconds to wait before they may be used."""
        if not self._rate:
            return 0.0
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now
        # the part beyond the capacity is owed by those who come later
        wait = max(0.0, min(units, self._capacity) - self._level) / self._rate
        self._level -= units
        return wait

    def give_back(self, units: float) -> None:
        """What was taken and not used; negative: what was used beyond."""
        self._level = min(self._capacity, self._level + units)


class Limits:
    """The requests and tokens that a process may ask for, and pauses that the server asks of all."""

    def __init__(self, rpm: float, tpm: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = Bucket(rpm, clock=clock)
        self._tokens = Bucket(tpm, clock=clock)
        self._resume_at = 0.0

    async def admit(self, tokens: float) -> None:
        """Waits until a request of about so many tokens may be sent."""
        wait = max(self._requests.take(1), self._tokens.take(tokens))
        if wait:
            await asyncio.sleep(wait)
        while (pause := self._resume_at - self._clock()) > 0:  # may have been put off meanwhile
            await asyncio.sleep(pause)

    def settle(self, estimated: float, used: float) -> None:
        """What a request that was admitted has used in the end."""
        self._tokens.give_back(estimated - used)

    def pause(self, seconds: float) -> None:
        """Nobody sends for so long."""
        self._resume_at = max(self._resume_at, self._clock() + seconds)
