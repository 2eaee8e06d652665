"""The double deficits: what each client may still send to each engine before others have had as much.

D2LPM (Cao et al., arXiv 2501.14312, algorithm 2), with weights, closed-form refill, and reserved charges.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

_MAX_IDLE = 65_536  # clients without a row under way whose deficits are remembered


@dataclass(slots=True)
class Account:
    """One client. deficits: by engine's number, in tokens of service. open: rows under way."""

    weight: float = 1.0
    deficits: list[float] = field(default_factory=list)
    open: int = 0


class Deficits:
    """``-U < q <= Q`` for each client and engine as long as estimates hold: U the largest charge, Q its quantum.

    So what a client is charged on any two engines since both are there differs by less than U + Q. An estimate that was
    wrong by e moves q by e more, until the client's next refill has made up for it.

    quantum: tokens of service for a client of weight 1 and an engine of speed 1.
    """

    def __init__(self, quantum: float) -> None:
        if quantum <= 0:
            raise ValueError(f"a quantum of {quantum}")
        self.quantum = quantum
        self.speeds: list[float] = []  # by engine's number; 0: there is no such engine (now)
        self.accounts: dict[str, Account] = {}  # clients with rows under way
        self._idle: OrderedDict[str, Account] = OrderedDict()  # longest idle first

    def engine_added(self, engine: int, speed: float) -> None:
        """Nobody has credit or debt with a new engine."""
        self.speeds += [0.0] * (engine + 1 - len(self.speeds))
        self.speeds[engine] = speed
        for account in (*self.accounts.values(), *self._idle.values()):
            if engine < len(account.deficits):
                account.deficits[engine] = 0.0

    def engine_lost(self, engine: int) -> None:
        """Its deficits count no more."""
        self.speeds[engine] = 0.0

    def opened(self, client: str, rows: int, weight: float) -> Account:
        """The client has more rows under way; its account, with a deficit for every engine."""
        account = self.accounts.get(client)
        if account is None:
            account = self._idle.pop(client) if client in self._idle else Account()
            self.accounts[client] = account
        account.weight = weight
        account.open += rows
        account.deficits += [0.0] * (len(self.speeds) - len(account.deficits))
        return account

    def closed(self, client: str, rows: int) -> None:
        """Rows of the client are done. Its debts and credits stay until it is one of many that are idle."""
        account = self.accounts[client]
        account.open -= rows
        if not account.open:
            self._idle[client] = self.accounts.pop(client)
            if len(self._idle) > _MAX_IDLE:
                self._idle.popitem(last=False)

    def refill(self, account: Account) -> None:
        """Add quanta until some engine has credit: as many rounds as that takes, at once. Nothing if one has."""
        share = account.weight * self.quantum
        here = [engine for engine, speed in enumerate(self.speeds) if speed]
        deficits, speeds = account.deficits, self.speeds
        while all(deficits[engine] <= 0 for engine in here):  # a second time only where rounding left a zero
            rounds = min(math.floor(-deficits[engine] / (share * speeds[engine])) + 1 for engine in here)
            for engine in here:
                deficits[engine] += rounds * share * speeds[engine]

    def charge(self, client: str, engine: int, service: float) -> None:
        """Service that was reserved (or, below 0, given back). A client that is forgotten is not charged."""
        account = self.accounts.get(client) or self._idle.get(client)
        if account is not None:
            account.deficits[engine] -= service
