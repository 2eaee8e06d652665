"""What a query may spend in this engine (``spark.llm.budget.*``): counted over all its streams, checked row by row."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spark_llm.engine.service.protocol import Budget

KEPT_QUERIES = 1024  # whose spending is remembered; the ones that asked least recently go first
CONDITION = "LLM_BUDGET_EXCEEDED"

Refusal = tuple[str, dict[str, str]]  # condition and parameters, as in Completion.error


@dataclass(slots=True)
class _Spent:
    """since: when the query's first row came, on the clock of ``Budgets``, in seconds."""

    since: float
    calls: int = 0
    length: int = 0


class Budgets:
    """Counts rows, tokens and time of queries that have a budget. Safe to call from several threads.

    A row counts as a call, and its prompt's tokens as spent, when it is admitted; its answer's tokens when it is done.
    So the tokens may go beyond the limit by those of rows already admitted, the calls never do. An engine that is
    started again counts anew.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._queries: OrderedDict[str, _Spent] = OrderedDict()

    def exceeded(self, query: str, budget: Budget) -> Refusal | None:
        """Why the query may ask no further row; None if it may. The query's time begins when this is first asked."""
        with self._lock:
            return self._exceeded(self._of(query), budget)

    def admit(self, query: str, budget: Budget, lengths: Sequence[int]) -> tuple[int, Refusal | None]:
        """How many rows, the first ones of those with prompts of ``lengths`` tokens, are within the budget.

        And, if not all are, why the others are not. Those that are count as asked from now on.
        """
        with self._lock:
            spent = self._of(query)
            for admitted, length in enumerate(lengths):
                refusal = self._exceeded(spent, budget)
                if refusal is not None:
                    return admitted, refusal
                spent.calls += 1
                spent.length += length
            return len(lengths), None

    def answered(self, query: str, length: int) -> None:
        """A row's answer has ``length`` tokens. Nothing for a query without a budget."""
        with self._lock:
            if query in self._queries:
                self._queries[query].length += length

    def _of(self, query: str) -> _Spent:
        spent = self._queries.setdefault(query, _Spent(self._clock()))
        self._queries.move_to_end(query)
        if len(self._queries) > KEPT_QUERIES:
            self._queries.popitem(last=False)
        return spent

    def _exceeded(self, spent: _Spent, budget: Budget) -> Refusal | None:
        seconds = self._clock() - spent.since
        if 0 < budget.calls <= spent.calls:
            return _refusal("maxCalls", str(budget.calls), f"the engine has made {spent.calls} calls")
        if 0 < budget.length <= spent.length:
            return _refusal("maxLength", str(budget.length), f"the engine has taken {spent.length} tokens")
        if 0 < budget.seconds <= seconds:
            return _refusal("maxTime", f"{budget.seconds:g} s", f"{seconds:.1f} s have passed since its first row")
        return None


def _refusal(name: str, limit: str, spent: str) -> Refusal:
    return CONDITION, {"key": f"spark.llm.budget.{name}", "limit": limit, "spent": spent}
