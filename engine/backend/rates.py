"""Requests and tokens a minute: who is early waits until what was taken has come back."""

from __future__ import annotations

import asyncio
import time

_MINUTE = 60.0


class Clock:
    """Seconds, and waiting for some."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Bucket:
    """Gives ``per_minute`` units a minute, in turn of asking; at most ``burst`` seconds' worth at once.

    per_minute 0: no limit. A request for more than the bucket holds leaves it in debt, which those behind it wait out.
    """

    def __init__(self, per_minute: float, clock: Clock, burst: float = 6.0) -> None:
        self._rate = per_minute / _MINUTE
        self._capacity = max(1.0, self._rate * burst)
        self._clock = clock
        self._level = self._capacity
        self._at = clock.now()

    def take(self, units: float) -> float:
        """Takes units; seconds to wait before they may be used."""
        if not self._rate:
            return 0.0
        now = self._clock.now()
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

    def __init__(self, rpm: float, tpm: float, clock: Clock) -> None:
        self._clock = clock
        self._requests = Bucket(rpm, clock)
        self._tokens = Bucket(tpm, clock)
        self._resume_at = 0.0

    async def admit(self, tokens: float) -> None:
        """Waits until a request of about so many tokens may be sent."""
        wait = max(self._requests.take(1), self._tokens.take(tokens))
        if wait:
            await self._clock.sleep(wait)
        while (pause := self._resume_at - self._clock.now()) > 0:  # may have been put off meanwhile
            await self._clock.sleep(pause)

    def settle(self, estimated: float, used: float) -> None:
        """What a request that was admitted has used in the end."""
        self._tokens.give_back(estimated - used)

    def pause(self, seconds: float) -> None:
        """Nobody sends for so long."""
        self._resume_at = max(self._resume_at, self._clock.now() + seconds)
