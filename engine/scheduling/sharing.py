"""How clients share the engine: which of those with waiting rows is next. Users share it, and queries what a user gets.

DLPM, deficit longest prefix match (Cao et al., arXiv 2501.14312): who has credit is served in prefix order, and all who
have none get a quantum when nobody who waits has any. VTC, virtual token counter (Sheng et al., OSDI'24, arXiv
2401.00588): who has been given least is next. Both by weight: balances and counters are divided by it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Protocol

from sortedcontainers import SortedKeyList

from spark_llm.engine.scheduling.accounts import Account
from spark_llm.engine.scheduling.row import Row, RowState
from spark_llm.engine.scheduling.waiting import nearest, prefix_order


class Sharing(Protocol):
    """An admission filter over members, users or the queries of one: those with waiting rows, and which is next.

    lone: the one that waits, if it is the only one; picking it needs no bookkeeping but its quanta.
    """

    lone: Account | None

    def __len__(self) -> int:
        """Members that wait."""

    def begin(self, member: Account) -> None:
        """The member's first row has come."""

    def gone(self, member: Account) -> None:
        """The member's last row has left, and the account is closed."""

    def enter(self, member: Account) -> None:
        """From now on a row of the member waits."""

    def leave(self, member: Account) -> None:
        """No row of the member waits any more."""

    def change(self, member: Account) -> None:
        """Another row of a member that waits is next, or it got something back."""

    def pick(self) -> Account:
        """The member whose row is next; one waits."""

    def taken(self, row: Row) -> None:
        """The row is admitted."""

    def price(self, row: Row, before: RowState, first: int) -> int:
        """Tokens of its prompt to charge a row for that was as ``before`` says, and got a share of a step.

        first: how many of them the share computes for the first time.
        """


class Deficits:
    """DLPM. A member's balance is its deficit: what is left of its quanta, in (-U, quantum] (U: see the docs).

    A round gives a quantum to each member whose balance is not above 0. Rounds are counted, not played: a member in
    debt has credit from the round ``due`` on, and members that do not wait are brought up to date when they are looked
    at. A debt is remembered until the first round after its member is gone; what is left of a quantum is not.
    """

    def __init__(self, quantum: float) -> None:
        self.quantum = quantum
        self.round = 0
        self._waiting: dict[Account, None] = {}
        self.lone: Account | None = None
        self._heads: SortedKeyList[Row] = SortedKeyList(key=prefix_order)  # of members with credit, the next rows
        self._owners: dict[Row, Account] = {}
        self._debtors: SortedKeyList[Account] = SortedKeyList(key=_due)
        self._changed: dict[Account, None] = {}  # to be put in their places by the next pick
        self._cursor = b""
        self._debts: OrderedDict[str, tuple[float, int]] = OrderedDict()  # name -> balance, round when it was gone

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, member: Account) -> None:
        member.balance, member.round = 0.0, self.round
        debt = self._debts.pop(member.name, None)
        if debt is not None:
            member.balance = debt[0]

    def gone(self, member: Account) -> None:
        if self._credit(member) < 0:
            self._debts[member.name] = (member.balance, self.round)

    def enter(self, member: Account) -> None:
        self._waiting[member] = None
        if len(self._waiting) == 1:
            self.lone = member
            return
        if self.lone is not None:
            self._changed[self.lone] = None
            self.lone = None
        self._changed[member] = None

    def leave(self, member: Account) -> None:
        del self._waiting[member]
        self._displace(member)
        self._changed.pop(member, None)
        self.lone = None
        if len(self._waiting) == 1:
            self.lone = next(iter(self._waiting))
            self._displace(self.lone)
            self._changed.clear()

    def change(self, member: Account) -> None:
        if self.lone is None:
            self._changed[member] = None

    def pick(self) -> Account:
        if self.lone is not None:
            if self._credit(self.lone) <= 0:
                self._advance(self.round + self._turns(self.lone))
                self._credit(self.lone)
            return self.lone
        while True:
            for member in self._changed:
                self._displace(member)
                self._place(member)
            self._changed.clear()
            if not self._heads:
                self._refill()
                continue
            member = self._owners[nearest(self._heads, self._cursor)[0]]
            if self._credit(member) > 0:
                return member
            self._changed[member] = None  # its running rows used it up

    def taken(self, row: Row) -> None:
        self._cursor = row.key

    def price(self, row: Row, before: RowState, first: int) -> int:
        return first

    def _credit(self, member: Account) -> float:
        """The member's balance, up to date."""
        member.collect()
        if member.balance <= 0 and member.round < self.round:
            member.balance += self.quantum * min(self.round - member.round, self._turns(member))
        member.round = self.round
        return member.balance

    def _turns(self, member: Account) -> int:
        """Rounds until a member in debt has credit."""
        return math.floor(-member.balance / self.quantum) + 1

    def _place(self, member: Account) -> None:
        if self._credit(member) > 0:
            row = member.head = member.peek()
            self._owners[row] = member
            self._heads.add(row)
        else:
            member.due = self.round + self._turns(member)
            self._debtors.add(member)

    def _displace(self, member: Account) -> None:
        if member.head is not None:
            self._heads.remove(member.head)
            del self._owners[member.head]
            member.head = None
        elif member.due:
            self._debtors.remove(member)
            member.due = 0

    def _refill(self) -> None:
        """As many rounds as the first member needs that has credit then, at once."""
        while True:
            first = self._debtors[0]
            self._credit(first)
            due = self.round + (self._turns(first) if first.balance <= 0 else 0)
            if due <= first.due:
                break
            self._debtors.remove(first)  # its running rows were charged since
            first.due = due
            self._debtors.add(first)
        self._advance(max(self.round, due))
        while self._debtors and self._debtors[0].due <= self.round:
            member = self._debtors.pop(0)
            member.due = 0
            self._changed[member] = None

    def _advance(self, to: int) -> None:
        self.round = to
        while self._debts and next(iter(self._debts.values()))[1] < to:
            self._debts.popitem(last=False)


class Counters:
    """VTC. A member's balance is its counter, below 0: the one with the greatest is next.

    Who comes to wait is lifted to the least counter of those that wait, or of the one that waited last. The counter of
    a member that is gone is remembered until it would be lifted anyway.
    """

    def __init__(self) -> None:
        self._waiting: dict[Account, None] = {}
        self.lone: Account | None = None
        self._order: SortedKeyList[Account] = SortedKeyList(key=_due)  # due: the counter when it was put there
        self._last: Account | None = None  # that waited
        self._floor = 0.0  # the balance of the one that waited last, if it is gone
        self._debts: dict[str, float] = {}
        self._ranked: SortedKeyList[tuple[float, str]] = SortedKeyList(key=_negated)  # of _debts; least counter first

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, member: Account) -> None:
        member.balance = self._debts.pop(member.name, 0.0)
        self._ranked.discard((member.balance, member.name))

    def gone(self, member: Account) -> None:
        member.collect()
        if self._last is member:
            self._last, self._floor = None, member.balance
        self._debts[member.name] = member.balance
        self._ranked.add((member.balance, member.name))
        reference = self._reference()
        while self._ranked and self._ranked[0][0] >= reference:
            del self._debts[self._ranked.pop(0)[1]]

    def enter(self, member: Account) -> None:
        member.collect()
        member.balance = min(member.balance, self._reference())
        self._waiting[member] = None
        if len(self._waiting) == 1:
            self.lone = member
            return
        if self.lone is not None:
            self._place(self.lone)
            self.lone = None
        self._place(member)

    def leave(self, member: Account) -> None:
        del self._waiting[member]
        self._last = member
        if self.lone is None:
            self._order.remove(member)
        self.lone = None
        if len(self._waiting) == 1:
            self.lone = next(iter(self._waiting))
            self._order.clear()

    def change(self, member: Account) -> None:
        if self.lone is None:
            self._order.remove(member)
            self._place(member)

    def pick(self) -> Account:
        if self.lone is not None:
            return self.lone
        while True:
            first: Account = self._order[0]
            first.collect()
            if first.due == -first.balance:
                return first
            self.change(first)

    def taken(self, row: Row) -> None:
        """Counters alone decide."""

    def price(self, row: Row, before: RowState, first: int) -> int:
        """The whole prompt, with the first share."""
        return 0 if before.high_water else row.num_prompt

    def _place(self, member: Account) -> None:
        member.collect()
        member.due = -member.balance
        self._order.add(member)

    def _reference(self) -> float:
        """The balance to which one that comes to wait is lifted."""
        member = self.pick() if self._waiting else self._last
        if member is None:
            return self._floor
        member.collect()
        return member.balance


def _due(member: Account) -> tuple[float, int]:
    return member.due, member.slot


def _negated(debt: tuple[float, str]) -> tuple[float, str]:
    return -debt[0], debt[1]
