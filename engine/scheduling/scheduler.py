"""Decides what each step computes. Planning reserves pages, commit keeps them, rollback returns them.

One rule serves prefill, chunked prefill, decode and resumption after preemption: a row with tokens left to compute
gets as many of them as the step's budget still has. Running rows come first, those that decode before others, then the
order policy's.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.request import Completion, FinishReason, Request
from spark_llm.engine.scheduling.accounts import Accounts
from spark_llm.engine.scheduling.admission import Admission
from spark_llm.engine.scheduling.charging import Charging
from spark_llm.engine.scheduling.decoding import DecodeReserve
from spark_llm.engine.scheduling.finishing import Finishing
from spark_llm.engine.scheduling.lanes import Floats, Ints, Lanes
from spark_llm.engine.scheduling.plan import NO_LANES, StepPlan
from spark_llm.engine.scheduling.row import Row, Scheduled
from spark_llm.engine.scheduling.running import Running
from spark_llm.engine.scheduling.undoing import undo_decode, undo_shares
from spark_llm.engine.scheduling.waiting import WaitingQueue


class Scheduler:
    """Waiting and running rows; the cost of a step is linear in what it schedules, not in what waits.

    Steps may be planned while earlier ones are in flight, as if those succeed and no answer ends early in them.
    They are committed oldest first, and rolled back newest first. Rows are preempted only while nothing is in
    flight: where pages are lacking before, the plan is empty until the steps in flight are done.

    max_batch_tokens: most tokens a step computes. max_running_rows: most rows that hold pages. late_rows: beyond these,
    for clients that have few running. ahead: steps are planned while others are in flight, as a rule; so constrained
    rows are sampled without masks where that pays.
    """

    def __init__(
        self,
        cache: CacheManager,
        waiting: WaitingQueue,
        *,
        max_batch_tokens: int,
        max_running_rows: int,
        late_rows: int = 0,
        ahead: bool = False,
    ) -> None:
        self.cache = cache
        self.waiting = waiting
        cache.eviction.follow(waiting)
        self.lanes = Lanes(max_running_rows + late_rows, cache.page_size, guesses=ahead)
        self.max_batch_tokens = max_batch_tokens
        self.step = 0
        self.preemptions = 0
        self.in_flight: list[StepPlan] = []  # planned, neither committed nor rolled back; oldest first
        self._rows: dict[int, Row] = {}  # request id -> row, waiting or running
        self._suspects: dict[int, Row] = {}  # of a failed step; planned alone
        self._drains = False
        self._arrivals = 0
        self._running = Running(cache, self.lanes, self.in_flight)
        self._decoding = DecodeReserve(cache, self.lanes, self.in_flight if ahead else None)
        self._finishing = Finishing(cache, self.lanes)
        self.accounts = Accounts()
        self.charging = Charging(self.accounts, waiting)
        self._admission = Admission(waiting, self._running, self._decoding, self.charging, late_rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def running(self) -> list[Row]:
        """Rows with a lane, their counters up to date, in the order in which they were admitted."""
        for row in self._running.rows:
            self.lanes.refresh(row)
        return list(self._running.rows)

    @property
    def forced_tokens(self) -> int:
        """Tokens of answers that followed from constraints."""
        return self._finishing.matching.forced_tokens

    @property
    def refused_tokens(self) -> int:
        """Tokens that were sampled without a mask and that a constraint did not allow."""
        return self._finishing.matching.refused_tokens

    @property
    def num_running(self) -> int:
        """How many rows have a lane."""
        return len(self._running.rows)

    def add(self, request: Request) -> None:
        """A request arrives; its length has been checked against the context and the pool."""
        row = Row(request, self._arrivals, self.cache.tree.root, self.accounts.open(request.client))
        self._arrivals += 1
        self._rows[request.id] = row
        self.waiting.push(row)
        if request.hints is not None and request.reuse:
            self.cache.eviction.announce(row.key, request.hints)

    def cancel(self, request_id: int) -> bool:
        """Forget a row and free its pages; False if it is not here (any more)."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return False
        self._suspects.pop(request_id, None)
        if row in self._running.rows:
            self.lanes.end(row)
            self._running.release(row)
        else:
            self.waiting.remove(row)
            self.cache.eviction.reconsider()
        self._close(row)
        self._sweep()
        return True

    def plan(self) -> StepPlan:
        """Choose and reserve the next step. Empty if nothing is left to plan, or if steps in flight must end first."""
        self.step += 1
        plan = StepPlan(self.step, self.lanes)
        if self.in_flight and (self._suspects or self._drains):
            return plan
        self._drains = not self._admission.make_way(self.step, self.preempt)
        if self._drains:
            return plan
        decode = NO_LANES
        if self._suspects:  # alone, so that one bad row cannot take others down twice
            self._plan_alone(plan, next(iter(self._suspects.values())))
        else:
            decode = self._plan_decode()
            generations = self.lanes.generation[decode]
            budget = self._plan_filling(plan, self.max_batch_tokens - len(decode))
            if not self._drains:
                self._admission.fill(plan, budget)
            decode = decode[self.lanes.are_here(decode, generations)]  # others were preempted since
        if plan.rows or len(decode):
            plan.seal(decode)
            self.charging.seal(plan)
            self.in_flight.append(plan)
        return plan

    def commit(
        self, plan: StepPlan, tokens: Ints, eos_ids: Collection[int], log_probs: Floats | None = None
    ) -> list[Completion]:
        """The oldest step in flight ran and sampled ``tokens``, in the plan's order. Returns the rows that are done.

        log_probs: of tokens that were chosen among candidates (see StepChoices).
        """
        assert plan is self.in_flight[0], "steps are committed oldest first"
        del self.in_flight[0]
        self.cache.tree.commit(plan.step)
        self._running.reserving.let_go(plan)
        lanes = np.concatenate([plan.sampling, plan.decode])
        here = self.lanes.are_here(lanes, plan.generations)
        self.charging.settle(plan, here)
        guessed = plan.guessed
        if not here.all():
            lanes, tokens, guessed = lanes[here], tokens[here], guessed[here]
            log_probs = None if log_probs is None else log_probs[here]
        if plan.alone:
            for scheduled in plan.shares():
                if self._suspects.pop(scheduled.row.request.id, None) is not None:
                    scheduled.row.attempts = 0
        ended, back, refused = self._finishing.take(lanes, tokens, eos_ids, log_probs, guessed)
        if refused:
            self.charging.refuse(plan.accounts[here][refused])
        for row in back:
            self._running.filling[row] = None
        done = []
        for row, reason in ended:
            del self._rows[row.request.id]
            self._suspects.pop(row.request.id, None)
            self._finishing.leave_marks(row)
            failure = self._finishing.failure(row, reason)
            done.append(row.completion(reason if failure is None else FinishReason.ERROR, failure))
        self._running.release(*(row for row, _ in ended))
        for row, _ in ended:
            self._close(row)
        self._sweep()
        return done

    def rollback(self, plan: StepPlan, *, failed: bool = True) -> list[Row]:
        """The newest step in flight failed: rows and pages are as before it. Returns its rows, which are suspects now.

        failed False: it goes because an earlier step failed, and its rows are not to blame.
        """
        assert plan is self.in_flight[-1], "steps are rolled back newest first"
        del self.in_flight[-1]
        self._running.reserving.let_go(plan)
        self.lanes.retell(plan.page_updates)
        self.charging.undo(plan)
        rows = undo_decode(plan, self._running)
        rows += undo_shares(plan, self._running, self.waiting, self.charging, self._rows)
        self._sweep()
        if failed:
            for row in rows:
                row.attempts += 1
                self._suspects[row.request.id] = row
        return rows

    def fail(self, row: Row, condition: str, parameters: dict[str, str]) -> Completion:
        """Give a row up."""
        self.cancel(row.request.id)
        return row.completion(FinishReason.ERROR, (condition, parameters))

    def preempt(self, row: Row) -> None:
        """Take a running row's pages away; it will be recomputed from what the cache still has.

        A token of it that is in flight is not waited for: it will be sampled again.
        """
        self.lanes.end(row)
        self._running.release(row)
        row.num_computed = 0
        row.detached = not row.request.reuse
        self.waiting.push_back(row)
        self.preemptions += 1

    def _plan_alone(self, plan: StepPlan, row: Row) -> None:
        plan.alone = True
        scheduled = None
        while scheduled is None:
            if row in self._running.rows:
                scheduled = self._reserve(row, plan.step, self.max_batch_tokens)
            else:
                scheduled = self._admission.admit(row, plan.step, self.max_batch_tokens, 0)
            if scheduled is None:  # alone in the pool every row fits: see Engine.add
                self.preempt(self._running.newest())
        plan.rows.append(scheduled)

    def _plan_decode(self) -> Ints:
        """Lanes that decode, with the pages they need."""
        decode = self._decoding.candidates(self.max_batch_tokens)
        while len(decode) and not self._decoding.renew(decode):
            if self.in_flight:
                self._drains = True
                return NO_LANES
            self.preempt(self._running.newest())  # the row admitted last gives way
            decode = decode[self.lanes.decodes[decode]]
        return decode

    def _plan_filling(self, plan: StepPlan, budget: int) -> int:
        """Rows that run and do not decode; what is left of the budget."""
        filling = self._running.filling
        for row in sorted(filling, key=lambda row: row.turn):
            while row in filling and row.remaining and budget > 0 and not self._drains:
                scheduled = self._reserve(row, plan.step, budget)
                if scheduled is not None:
                    plan.rows.append(scheduled)
                    budget -= scheduled.count
                    break
                if self.in_flight:
                    self._drains = True
                else:
                    self.preempt(self._running.newest())  # be it this one
        return budget

    def _reserve(self, row: Row, step: int, budget: int) -> Scheduled | None:
        """A running row's next chunk; None: there are too few pages."""
        before = row.state()
        if row.remaining > 1:
            self._running.reserving.extend_match(row)
        scheduled = self._running.reserving.reserve(row, before, step, budget)
        if scheduled is not None:
            self.charging.share(scheduled, before)
            if scheduled.samples:
                del self._running.filling[row]
        return scheduled

    def _close(self, row: Row) -> None:
        """The row is no more."""
        assert row.account is not None
        self.accounts.close(row.account, self.step)

    def _sweep(self) -> None:
        """Forget clients that nothing is left of."""
        for query in self.accounts.sweep(self.in_flight[0].step if self.in_flight else self.step + 1):
            self.waiting.gone(query)
