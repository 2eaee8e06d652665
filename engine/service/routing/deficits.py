"""The double deficits: what each client may still send to each engine before others have had as much.

D2LPM (Cao et al., arXiv 2501.14312, algorithm 2), with weights, closed-form refill, and reserved charges.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from spark_llm.engine.service.routing.fleet import Flags, Fleet, Floats

_MAX_IDLE = 65_536  # clients without a row under way whose deficits are remembered


@dataclass(slots=True)
class Account:
    """One client. deficits: by engine's number, in tokens of service. open: rows under way."""

    deficits: Floats
    weight: float = 1.0
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
        self.accounts: dict[str, Account] = {}  # clients with rows under way
        self._idle: OrderedDict[str, Account] = OrderedDict()  # longest idle first

    def engine_added(self, engine: int) -> None:
        """Nobody has credit or debt with a new engine; its number may have been another's."""
        for account in (*self.accounts.values(), *self._idle.values()):
            account.deficits[engine : engine + 1] = 0.0

    def opened(self, client: str, rows: int, weight: float, engines: int) -> Account:
        """The client has more rows under way; its account, with a deficit for every engine."""
        account = self.accounts.get(client)
        if account is None:
            account = self._idle.pop(client) if client in self._idle else Account(np.zeros(engines))
            self.accounts[client] = account
        account.weight = weight
        account.open += rows
        if len(account.deficits) < engines:
            account.deficits = np.append(account.deficits, np.zeros(engines - len(account.deficits)))
        return account

    def closed(self, client: str, rows: int) -> None:
        """Rows of the client are done. Its debts and credits stay until it is one of many that are idle."""
        account = self.accounts[client]
        account.open -= rows
        if not account.open:
            self._idle[client] = self.accounts.pop(client)
            if len(self._idle) > _MAX_IDLE:
                self._idle.popitem(last=False)

    def refill(self, account: Account, fleet: Fleet) -> Flags:
        """Add quanta until some engine has credit: as many rounds as that takes, at once. Which ones have."""
        while not (credit := fleet.here & (account.deficits > 0)).any():  # twice only where rounding left a zero
            quanta = account.weight * self.quantum * fleet.speeds
            rounds = np.floor(-account.deficits / quanta)[fleet.here].min() + 1
            account.deficits[fleet.here] += rounds * quanta[fleet.here]
        return credit

    def charge(self, client: str, engine: int, service: float) -> None:
        """Service that was reserved (or, below 0, given back). A client that is forgotten is not charged."""
        account = self.accounts.get(client) or self._idle.get(client)
        if account is not None:
            account.deficits[engine] -= service
