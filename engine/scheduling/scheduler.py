"""Decides what each step computes. Planning reserves pages, commit keeps them, rollback returns them.

One rule serves prefill, chunked prefill, decode and resumption after preemption: a row with ``remaining``
tokens gets as many of them as the step's budget still has. Running rows come first, then the order policy's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.pool import Pages
from spark_llm.engine.cache.radix import Node
from spark_llm.engine.request import Completion, FinishReason, Request
from spark_llm.engine.scheduling.row import Row, RowState, Scheduled
from spark_llm.engine.scheduling.waiting import WaitingQueue

# Answer tokens a running row is expected to still need when a new one asks for pages. All of max_tokens
# would leave most of the pool idle (answers end early); too few and rows are preempted.
_LOOKAHEAD = 32


@dataclass(slots=True)
class StepPlan:
    """What one step computes; ``rows`` in the order in which they were planned."""

    step: int
    rows: list[Scheduled] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(s.count for s in self.rows)


class Scheduler:
    """Waiting and running rows; the cost of a step is linear in what it schedules, not in what waits.

    max_batch_tokens: most tokens a step computes. max_running_rows: most rows that hold pages.
    """

    def __init__(
        self, cache: CacheManager, waiting: WaitingQueue, *, max_batch_tokens: int, max_running_rows: int
    ) -> None:
        self.cache = cache
        self.waiting = waiting
        cache.eviction.follow(waiting)
        self.running: list[Row] = []
        self.max_batch_tokens = max_batch_tokens
        self.max_running_rows = max_running_rows
        self.step = 0
        self.preemptions = 0
        self._rows: dict[int, Row] = {}  # request id -> row, waiting or running
        self._suspects: dict[int, Row] = {}  # of a failed step; planned alone
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, request: Request) -> None:
        """A request arrives; its length has been checked against the context and the pool."""
        row = Row(request, self._arrivals, self.cache.tree.root, self.cache.page_size)
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
        if row in self.running:
            self.running.remove(row)
            self._release(row)
        else:
            self.waiting.remove(row)
            self.cache.eviction.reconsider()
        return True

    def plan(self) -> StepPlan:
        """Choose and reserve the next step. The plan may be empty only if nothing waits or runs."""
        self.step += 1
        plan = StepPlan(self.step)
        if self._suspects:  # alone, so that one bad row cannot take others down twice
            self._plan_alone(plan, next(iter(self._suspects.values())))
            return plan
        budget = self.max_batch_tokens
        at = 0
        while at < len(self.running) and budget > 0:  # the list shrinks from its end when rows are preempted
            row = self.running[at]
            scheduled = self._reserve(row, row.state(), plan.step, budget)
            if scheduled is not None:
                plan.rows.append(scheduled)
                budget -= scheduled.count
                at += 1
            else:  # the row admitted last gives way, be it this one
                self.preempt(self.running[-1])
        ahead = sum(self._lookahead(row) for row in self.running)
        while budget > 0 and len(self.running) < self.max_running_rows:
            candidate = self.waiting.peek()
            if candidate is None:
                break
            scheduled = self._admit(candidate, plan.step, budget, ahead)
            if scheduled is None:
                break
            plan.rows.append(scheduled)
            budget -= scheduled.count
            ahead += self._lookahead(candidate)
        return plan

    def commit(self, plan: StepPlan, tokens: dict[int, int], eos_ids: frozenset[int]) -> list[Completion]:
        """The step ran: ``tokens`` maps request id to sampled token. Returns the rows that are done."""
        self.cache.tree.commit(plan.step)
        done = []
        for scheduled in plan.rows:
            row = scheduled.row
            self._suspects.pop(row.request.id, None)
            row.attempts = 0
            token = tokens.get(row.request.id)
            if token is None:
                continue
            reason = self._take(row, token, eos_ids)
            if reason is not None:
                self._forget(row)
                done.append(row.completion(reason))
        return done

    def rollback(self, plan: StepPlan) -> None:
        """The step failed: all rows and pages are as before it; its rows are suspects now."""
        keep: list[Pages] = []
        private: list[Pages] = []
        for scheduled in reversed(plan.rows):
            row, before = scheduled.row, scheduled.before
            private.append(row.pages[max(row.tree_pages, before.num_pages) : row.num_pages].copy())
            keep.append(row.pages[before.tree_pages : before.num_pages].copy())
            self._undo(row, before)
            row.recomputed += scheduled.count  # what the failed step computed is to be computed again
            row.attempts += 1
            self._suspects[row.request.id] = row
            if scheduled.admitted:
                self.running.remove(row)
                self.waiting.push_back(row)
        self.cache.rollback(plan.step, np.concatenate([*keep, np.empty(0, np.int32)]))
        for pages in private:
            self.cache.pool.release(pages)

    def fail(self, row: Row, condition: str, parameters: dict[str, str]) -> Completion:
        """Give a row up."""
        self.cancel(row.request.id)
        return row.completion(FinishReason.ERROR, (condition, parameters))

    def preempt(self, row: Row) -> None:
        """Take a running row's pages away; it will be recomputed from what the cache still has."""
        self.running.remove(row)
        self._release(row)
        row.num_computed = 0
        row.detached = not row.request.reuse
        self.waiting.push_back(row)
        self.preemptions += 1

    def _plan_alone(self, plan: StepPlan, row: Row) -> None:
        scheduled = None
        while scheduled is None:
            if row in self.running:
                scheduled = self._reserve(row, row.state(), plan.step, self.max_batch_tokens)
            else:
                self.waiting.remove(row)
                self.waiting.push_back(row)  # so that it is the one that is popped
                scheduled = self._admit(row, plan.step, self.max_batch_tokens, 0)
            if scheduled is None:  # alone in the pool every row fits: see Engine.add
                self.preempt(self.running[-1])
        plan.rows.append(scheduled)

    def _admit(self, row: Row, step: int, budget: int, ahead: int) -> Scheduled | None:
        """Reserve the first chunk of the row that the queue shows, if its prompt and the answers still fit.

        ahead: tokens that the running rows are expected to add.
        """
        before = row.state()
        self._extend_match(row)
        needed = self.cache.pages_for(row.remaining) + self.cache.pages_for(ahead)
        if self.running and needed > self.cache.available:
            self._undo(row, before)
            return None
        scheduled = self._reserve(row, before, step, budget)
        if scheduled is None:
            return None
        scheduled.admitted = True
        self.waiting.pop()
        self.running.append(row)
        return scheduled

    def _reserve(self, row: Row, before: RowState, step: int, budget: int) -> Scheduled | None:
        """Give a row the pages for its next tokens and put full prompt pages into the index.

        None: there are too few pages, and the row is as ``before`` says.
        """
        if row.remaining > 1:
            self._extend_match(row)
        start, count = row.num_computed, min(row.remaining, budget)
        missing = self.cache.pages_for(start + count) - row.num_pages
        if missing > 0:
            pages = self.cache.allocate(missing)
            if pages is None:
                self._undo(row, before)
                return None
            row.pages[row.num_pages : row.num_pages + missing] = pages
            row.num_pages += missing
        row.count_computed(start, start + count)
        row.num_computed += count
        self._index(row, step)
        return Scheduled(row, start, count, before, admitted=False)

    @staticmethod
    def _lookahead(row: Row) -> int:
        return min(row.request.params.max_tokens - len(row.output), _LOOKAHEAD)

    def _undo(self, row: Row, before: RowState) -> None:
        """Let the row be as it was; pages that it was given since are the caller's business."""
        self._move(row, before.node)
        row.restore(before)

    def _move(self, row: Row, node: Node) -> None:
        """Let the row stand on another node of its path."""
        if node is not row.node:
            self.cache.tree.lock(node)
            self.cache.tree.unlock(row.node)
            row.node = node

    def _extend_match(self, row: Row) -> None:
        """Adopt what the index knows of the row's next tokens; at least one token is left to compute."""
        size = self.cache.page_size
        at = row.tree_pages * size
        if row.detached or row.num_computed != at or row.num_pages != row.tree_pages:
            return
        node, found = self.cache.tree.match(row.tokens[at : row.num_tokens - 1], row.node)
        if not found:
            return
        self._move(row, node)
        for pages in found:
            row.pages[row.num_pages : row.num_pages + len(pages)] = pages
            row.num_pages += len(pages)
        row.tree_pages = row.num_pages
        row.num_computed = row.num_pages * size
        row.count_matched(at, row.num_computed)

    def _index(self, row: Row, step: int) -> None:
        size = self.cache.page_size
        full = min(row.num_computed, row.num_prompt) // size
        if row.detached or full <= row.tree_pages:
            return
        tokens = row.tokens[row.tree_pages * size : full * size].copy()
        child = self.cache.tree.insert(row.node, tokens, row.pages[row.tree_pages : full].copy(), step, row.key)
        if child is None:  # the same prompt is there already: this row had to compute its last tokens itself
            row.detached = True
            return
        self._move(row, child)
        row.tree_pages = full

    def _take(self, row: Row, token: int, eos_ids: frozenset[int]) -> FinishReason | None:
        params = row.request.params
        if token in eos_ids and not params.ignore_eos:
            row.output.append(token)  # reported as generated; it has no place in the text
            return FinishReason.STOP
        row.append(token)
        if row.request.is_stopped is not None and row.request.is_stopped(row.output):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(row.output) >= params.max_tokens else None

    def _forget(self, row: Row) -> None:
        hints = row.request.hints
        if hints is not None and hints.shared_tokens and row.request.reuse:
            node, _ = self.cache.tree.match(row.tokens[: hints.shared_tokens])
            self.cache.eviction.done(node, hints)
        del self._rows[row.request.id]
        self.running.remove(row)
        self._release(row)

    def _release(self, row: Row) -> None:
        self.cache.pool.release(row.pages[row.tree_pages : row.num_pages])
        self._move(row, self.cache.tree.root)
        row.num_pages = row.tree_pages = 0
