"""Which waiting rows a step begins with, and when a row that runs makes way for one of them.

Where a client's long batch has all lanes, its rows were admitted together and end together: a client that comes then
would wait for an answer's whole length. So a few lanes are kept for clients that have few rows running.
"""

from __future__ import annotations

from collections.abc import Callable

from spark_llm.engine.scheduling.charging import Charging
from spark_llm.engine.scheduling.decoding import DecodeReserve
from spark_llm.engine.scheduling.making_way import PATIENCE, row_that_makes_way
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row, Scheduled
from spark_llm.engine.scheduling.running import Running
from spark_llm.engine.scheduling.waiting import WaitingQueue


class Admission:
    """Rows in the order in which ``waiting`` shows them, as long as the step's budget, lanes and pages last.

    late_rows: the last so many lanes are for rows of clients that run fewer rows than that.
    """

    def __init__(
        self, waiting: WaitingQueue, running: Running, decoding: DecodeReserve, charging: Charging, late_rows: int = 0
    ) -> None:
        self.waiting = waiting
        self.running = running
        self.decoding = decoding
        self.charging = charging
        self._late_rows = late_rows
        self._admitted_at = 0  # step, or when nobody was kept out last

    def make_way(self, step: int, preempt: Callable[[Row], None]) -> bool:
        """Where a client has been kept out for long, preempt a row for it. False: steps in flight must end first."""
        if not self.waiting.shares or step - self._admitted_at <= PATIENCE:
            return True
        running = self.running
        candidate = self.waiting.peek()
        row = None
        if candidate is not None:
            row = row_that_makes_way(candidate, reversed(running.rows), self.charging.accounts.users.values())
        if row is None:
            self._admitted_at = step
            return True
        if running.in_flight:
            return False
        preempt(row)
        return True

    def fill(self, plan: StepPlan, budget: int) -> None:
        """Add to the step the first shares of waiting rows, of ``budget`` tokens at most."""
        lanes = self.running.lanes
        ahead = -1
        if budget <= 0 or not len(self.waiting):
            self._admitted_at = plan.step  # nobody is kept out by rows that run
        while budget > 0 and lanes.free:
            candidate = self.waiting.peek()
            if candidate is None or not self._has_lane(candidate):
                break
            if ahead < 0:
                ahead = self.decoding.ahead() + sum(map(self.decoding.ahead_of, self.running.filling))
            scheduled = self.admit(candidate, plan.step, budget, ahead)
            if scheduled is None:
                break
            plan.rows.append(scheduled)
            budget -= scheduled.count
            ahead += self.decoding.ahead_of(candidate)
            self._admitted_at = plan.step

    def _has_lane(self, row: Row) -> bool:
        if self.running.lanes.free > self._late_rows:
            return True
        assert row.account is not None
        return self.waiting.shares and row.account.user.running < self._late_rows

    def admit(self, row: Row, step: int, budget: int, ahead: int) -> Scheduled | None:
        """Reserve the first chunk of a waiting row; None: its prompt and the answers do not fit.

        ahead: pages that the running rows are expected to ask for.
        """
        running, reserving = self.running, self.running.reserving
        cache = running.cache
        before = row.state()
        running.lanes.enter(row)
        reserving.extend_match(row)
        scheduled = None
        if running.rows and cache.pages_for(row.remaining) + ahead > cache.available:
            reserving.undo(row, before)
        else:
            scheduled = reserving.reserve(row, before, step, budget)
        if scheduled is None:
            running.lanes.leave(row)
            return None
        scheduled.admitted = True
        self.charging.share(scheduled, before)
        self.waiting.take(row)
        running.enter(row, fills=not scheduled.samples)
        return scheduled
