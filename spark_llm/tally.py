"""What tasks have done so far: the counters of a call in a task, and the driver's store of them by query."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

_log = logging.getLogger("spark_llm")

MAX_QUERIES = 1000  # the driver forgets the oldest beyond this
MAX_ERRORS = 5  # sample messages kept of a query
MAX_CALLS = 32  # distinct prompts kept apart in a query's break-down
OTHER_PROMPTS = "(other prompts)"


class Counts(msgspec.Struct, kw_only=True):
    """Totals over rows; once every row has its answer,
    ``rows + asked_again == calls + shared + duplicates + stored + skipped + nulls + failed + over_budget``.

    calls: prompts that the engine computed. shared: rows beyond the first of prompts with several rows
    (``spark.llm.join.rowsPerPrompt``). asked_again: rows that had no clear answer there, and were asked alone.
    duplicates: rows that took the answer of an equal row of their query.
    stored: rows answered from the result cache. skipped: rows that are NULL because the query does not need their
    answer (a mask, another condition that drops the row, a limit that is reached). nulls: rows answered NULL without
    a call. failed: rows that the engine could not answer. over_budget: rows that are NULL because of the budget.
    first_sent, last_answer: seconds since the epoch, 0 before the first.
    """

    rows: int = 0
    calls: int = 0
    duplicates: int = 0
    stored: int = 0
    skipped: int = 0
    nulls: int = 0
    failed: int = 0
    over_budget: int = 0
    shared: int = 0
    asked_again: int = 0
    prompt_tokens: int = 0
    instruction_tokens: int = 0
    cached_tokens: int = 0
    cached_instruction_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    output_tokens: int = 0
    first_sent: float = 0.0
    last_answer: float = 0.0
    errors: list[str] = msgspec.field(default_factory=list)

    def fail(self, message: str) -> None:
        """Count a row that could not be answered."""
        self.failed += 1
        self._note([message])

    def add(self, other: Counts) -> None:
        """Add another task's counts to these."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.first_sent:
            self.first_sent = min(self.first_sent or other.first_sent, other.first_sent)
        self.last_answer = max(self.last_answer, other.last_answer)
        self._note(other.errors)

    def _note(self, messages: Iterable[str]) -> None:
        for message in messages:
            if len(self.errors) < MAX_ERRORS and message not in self.errors:
                self.errors.append(message)


_SUMS = tuple(f for f in Counts.__struct_fields__ if f not in ("first_sent", "last_answer", "errors"))


class TaskUpdate(msgspec.Struct, kw_only=True):
    """Everything that one call has done in one task attempt up to now; a later update replaces an earlier.

    task: an id of this attempt and call. attempt: Spark's id, the same for all calls of a task. prompt: the
    call's prompt, shortened. embeds: the call makes vectors. read: rows taken from Spark.
    answered: rows whose answer is known, also those not handed to Spark yet. ended: there is no more input.
    progress: the session's spark.llm.progress.
    """

    query: str
    task: str
    stage: int = -1
    attempt: int = -1
    prompt: str = ""
    embeds: bool = False
    progress: str = "auto"
    number: int = 0
    read: int = 0
    answered: int = 0
    ended: bool = False
    counts: Counts = msgspec.field(default_factory=Counts)


class Tally:
    """The newest update of every task, by query in the order in which queries were first heard of.

    Thread-safe. ``changed`` is notified whenever an update arrives, a task goes, or ``close`` is called.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.closed = False
        self._queries: OrderedDict[str, dict[str, TaskUpdate]] = OrderedDict()
        self._connected: dict[str, str] = {}  # task -> query

    def merge(self, update: TaskUpdate) -> None:
        """Take an update over unless a newer one of the same task is there."""
        with self.changed:
            tasks = self._queries.setdefault(update.query, {})
            known = tasks.get(update.task)
            if known is not None and known.number >= update.number:
                return
            first_failure = update.counts.failed and not any(t.counts.failed for t in tasks.values())
            tasks[update.task] = update
            while len(self._queries) > MAX_QUERIES:
                self._queries.popitem(last=False)
            self.changed.notify_all()
        if first_failure:
            _log.warning(
                "llm(): rows of query %s could not be answered and are NULL; the first: %s "
                "(spark_llm.last_report(spark) counts them; spark.llm.onError = fail stops at the first)",
                update.query,
                update.counts.errors[0],
            )

    def connected(self, update: TaskUpdate) -> None:
        """A task works: it will send updates until ``gone``."""
        with self.changed:
            self._connected[update.task] = update.query
            self.changed.notify_all()

    def gone(self, task: str) -> None:
        """A task ended, however it ended."""
        with self.changed:
            self._connected.pop(task, None)
            self.changed.notify_all()

    def active(self) -> dict[str, list[TaskUpdate]]:
        """The queries that have a connected task, with the newest update of all their tasks."""
        with self.changed:
            working = set(self._connected.values())
            return {query: list(tasks.values()) for query, tasks in self._queries.items() if query in working}

    def working(self) -> frozenset[str]:
        """The ids of the tasks that are connected."""
        with self.changed:
            return frozenset(self._connected)

    def close(self) -> None:
        """No more updates will come."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def queries(self) -> list[str]:
        """All queries known, first heard of first."""
        with self.changed:
            return list(self._queries)

    def counts(self, query: str, with_embeddings: bool = True) -> dict[str, Counts]:
        """A query's totals by prompt, in the order in which the prompts were first heard of."""
        with self.changed:
            updates = list(self._queries.get(query, {}).values())
        updates = [update for update in updates if with_embeddings or not update.embeds]
        totals: dict[str, Counts] = {}
        for update in updates:
            known = update.prompt in totals or len(totals) < MAX_CALLS
            totals.setdefault(update.prompt if known else OTHER_PROMPTS, Counts()).add(update.counts)
        return totals
