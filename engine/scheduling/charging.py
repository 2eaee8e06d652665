"""What steps cost their clients: planning reserves it, commit settles it, rollback returns it.

A token of a prompt costs 1, a token of an answer 2, as published for both DLPM and VTC. DLPM charges the tokens of a
prompt that are computed for the first time; VTC the whole prompt, when its row is first admitted. What is computed
again after a preemption or a failed step is not charged. A prefix that several rows share is paid by the row that
computes it; where that row's step is rolled back, by the one that computes it then. Tokens of an answer that follow
from a constraint are computed like those of a prompt, and cost as much. A token that a constraint refuses is returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spark_llm.engine.scheduling.accounts import Accounts, Slots
from spark_llm.engine.scheduling.lanes import Flags
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row, RowState, Scheduled
from spark_llm.engine.scheduling.waiting import WaitingQueue

OUTPUT_COST = 2.0  # of a token of an answer; a token of a prompt costs 1


@dataclass(slots=True)
class Computed:
    """Tokens of committed steps by what they were for. Their sum is what went through the model.

    prefill: of prompts, for the first time. decode: of answers. recomputed: that had been there before. wasted: of
    answers whose rows had ended, gone or gone back by then; nobody pays for those.
    """

    prefill: int = 0
    decode: int = 0
    recomputed: int = 0
    wasted: int = 0


class Charging:
    """Charges the accounts of a scheduler's rows. settled: weighted tokens charged for good, of all clients ever."""

    def __init__(self, accounts: Accounts, waiting: WaitingQueue) -> None:
        self.accounts = accounts
        self.waiting = waiting
        self.computed = Computed()
        self.settled = 0.0

    def share(self, scheduled: Scheduled, before: RowState) -> None:
        """A row got a share of the step that is being planned."""
        row = scheduled.row
        scheduled.first = row.computed - before.computed
        scheduled.charge = self.waiting.price(row, before, scheduled.first)
        scheduled.again = row.recomputed - before.recomputed
        if row.request.constraint is not None:
            scheduled.charge += scheduled.count - scheduled.first - scheduled.again
        if scheduled.charge:
            assert row.account is not None
            self.accounts.charge(row.account, scheduled.charge)

    def seal(self, plan: StepPlan) -> None:
        """The plan is complete: reserve the tokens that it samples."""
        if len(plan.accounts):
            self.accounts.charge_each(plan.accounts, OUTPUT_COST)

    def settle(self, plan: StepPlan, here: Flags) -> None:
        """The step ran. here: for each token sampled whether its row is still there; else it is returned."""
        emitted = int(np.count_nonzero(here))
        if emitted < len(here):
            self._give_back(plan, ~here)
        decoded = int(np.count_nonzero(here[len(plan.sampling) :]))
        total = self.computed
        for scheduled in plan.rows:
            total.prefill += scheduled.first
            total.recomputed += scheduled.again
            total.decode += scheduled.count - scheduled.first - scheduled.again
            self.settled += scheduled.charge
        total.decode += decoded
        total.wasted += len(plan.decode) - decoded
        self.settled += OUTPUT_COST * emitted

    def refuse(self, slots: Slots) -> None:
        """Tokens that ``settle`` took for answers' are none: return them. slots: of their accounts, one for each."""
        self.settled -= OUTPUT_COST * len(slots)
        self._return(slots)

    def undo(self, plan: StepPlan) -> None:
        """The step is rolled back: return what it reserved."""
        if len(plan.accounts):
            self._give_back(plan, np.ones(len(plan.accounts), np.bool_))

    def undo_share(self, row: Row, charge: int) -> None:
        """Return what a row of a step that is rolled back was charged for its prompt."""
        if charge:
            assert row.account is not None
            self.accounts.charge(row.account, -charge)
            self.waiting.credited(row.account)

    def keep_share(self, charge: int) -> None:
        """The step is rolled back, but its row was preempted meanwhile and pays now what it computes later unpaid."""
        self.settled += charge

    def _give_back(self, plan: StepPlan, which: Flags) -> None:
        self._return(plan.accounts[which])

    def _return(self, slots: Slots) -> None:
        self.accounts.charge_each(slots, -OUTPUT_COST)
        for query in self.accounts.queries_of(slots):
            self.waiting.credited(query)
