"""The report of a query: what was asked, what the engine reused and computed, and how long it took.

``install`` sets the counters of a SparkContext up; tasks send them (see ``backchannel``), ``last_report`` and
``reports`` read them on the driver. Work counts where it was done: a failed or repeated task attempt that
could tell the driver counts with the rows it really answered, and so does a stage that Spark computes again.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from spark_llm.backchannel import Address, Listener
from spark_llm.clients import pool_weights
from spark_llm.coordination import Coordination, DriverAddress
from spark_llm.tally import Counts, Tally, TaskUpdate

if TYPE_CHECKING:
    from pyspark import Accumulator, SparkContext
    from pyspark.sql import SparkSession

    from spark_llm.config import LlmConf
    from spark_llm.engine.service.coordinator_protocol import Cluster

_log = logging.getLogger("spark_llm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one query did in all its ``llm(...)`` calls; counts are rows or tokens.

    query: Spark's execution id, or ``stage-N`` for work outside a SQL query.
    rows + asked_again == calls + shared + duplicates + stored + skipped + nulls + failed + over_budget, unless Spark
    stopped the query early.
    calls: prompts that the engine really computed. duplicates: rows that took the answer of an equal row.
    stored: rows answered from the result cache. skipped: rows not asked, because the query does not need their answer.
    nulls: rows answered NULL without a call (NULL prompt, or all fields NULL).
    failed: rows that the engine could not answer; ``errors`` has samples of why.
    over_budget: rows that are NULL because the query's budget was spent; a rerun completes them.
    shared: rows beyond the first of prompts with several rows (``spark.llm.join.rowsPerPrompt``); asked_again: rows
    that had no clear answer there, and were asked alone.
    prompt_tokens == cached_tokens + computed_tokens, of which the instruction (template and prompt, not
    fields) has instruction_tokens and cached_instruction_tokens. recomputed_tokens were computed again.
    seconds: from the first request sent to the last answer, over all tasks, by the clocks of their hosts.
    by_call: the same for each prompt of the query.
    """

    query: str
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
    seconds: float = 0.0
    errors: tuple[str, ...] = ()
    by_call: Mapping[str, Report] = dataclasses.field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Has every row the answer that it asked for? If not, a rerun asks the rest."""
        return not (self.failed or self.over_budget)

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens found in the prefix cache, 0 to 1."""
        return _share(self.cached_tokens, self.prompt_tokens)

    @property
    def instruction_hit_rate(self) -> float:
        """The same for the tokens of template and prompt."""
        return _share(self.cached_instruction_tokens, self.instruction_tokens)

    @property
    def data_hit_rate(self) -> float:
        """The same for the tokens of fields."""
        return _share(self.cached_tokens - self.cached_instruction_tokens, self.prompt_tokens - self.instruction_tokens)

    def __str__(self) -> str:
        lines = [
            f"query {self.query}: {self.rows:,} rows in {self.seconds:,.1f} s",
            f"  calls          {self.calls:>10,}   {self.duplicates:,} duplicates folded, "
            + (f"{self.stored:,} from the result cache, " if self.stored else "")
            + (f"{self.shared:,} in the prompt of another row, " if self.shared else "")
            + (f"{self.asked_again:,} asked again alone, " if self.asked_again else "")
            + (f"{self.skipped:,} not needed, " if self.skipped else "")
            + f"{self.nulls:,} NULL without a call, {self.failed:,} failed"
            + (f", {self.over_budget:,} NULL beyond the budget" if self.over_budget else ""),
            f"  prompt tokens  {self.prompt_tokens:>10,}   {self.computed_tokens:,} computed, "
            f"{self.cached_tokens:,} from cache"
            + (f", {self.recomputed_tokens:,} recomputed" if self.recomputed_tokens else ""),
            f"  prefix hits    {self.prefix_hit_rate:>10.1%}   data {self.data_hit_rate:.1%}, "
            f"instruction {self.instruction_hit_rate:.1%}",
            f"  output tokens  {self.output_tokens:>10,}",
        ]
        lines += [f"  failed row: {error}" for error in self.errors]
        return "\n".join(lines)


def _total(by_call: Mapping[str, Counts]) -> Counts:
    total = Counts()
    for counts in by_call.values():
        total.add(counts)
    return total


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _report(query: str, counts: Counts, by_call: Mapping[str, Report]) -> Report:
    names = {field.name for field in dataclasses.fields(Report)} & set(Counts.__struct_fields__) - {"errors"}
    return Report(
        query=query,
        seconds=max(0.0, counts.last_answer - counts.first_sent) if counts.first_sent else 0.0,
        errors=tuple(counts.errors),
        by_call=by_call,
        **{name: getattr(counts, name) for name in names},
    )


class ReportSink(NamedTuple):
    """What a task needs to know of the driver; travels in the UDF's closure.

    address: where its counters go. cluster: who knows the engines of all executors, once a query asked for that.
    pools: weights of the fair scheduler's pools, where they are not 1.
    """

    accumulator: Accumulator[list[TaskUpdate]]
    address: Address | None
    cluster: Cluster | None = None
    pools: tuple[tuple[str, float], ...] = ()


class Reports:
    """The counters of one SparkContext, on the driver."""

    def __init__(self, context: SparkContext) -> None:
        self.tally = Tally()
        address = DriverAddress.of(context)
        self.coordination = Coordination(address)
        self._listener = _listen(self.tally, address)
        self.sink = ReportSink(
            context.accumulator([], _Merging(self.tally)),
            self._listener.address if self._listener else None,
            pools=tuple(pool_weights(context).items()),
        )

    def coordinate(self, conf: LlmConf) -> None:
        """From now on ``sink`` names the coordinator of the application's engines. Raises what starting it raises."""
        self.sink = self.sink._replace(cluster=self.coordination.start(conf))

    def report(self, query: str) -> Report | None:
        """The report of one query, None when it has none."""
        by_call = self.tally.counts(query)
        if not by_call:
            return None
        return _report(query, _total(by_call), {prompt: _report(query, c, {}) for prompt, c in by_call.items()})

    def tokens_per_second(self) -> float | None:
        """What the application's newest query of some size came to, through the model, prompts and answers; None
        before there was one. Embeddings do not count: an encoder is another model, and far faster."""
        for query in reversed(self.tally.queries()):
            report = _report(query, _total(self.tally.counts(query, with_embeddings=False)), {})
            tokens = report.computed_tokens + report.output_tokens
            if tokens >= _RATED_TOKENS and report.seconds > 0:
                return tokens / report.seconds
        return None

    def all(self) -> list[Report]:
        """The reports of all queries, oldest first."""
        found = [self.report(query) for query in self.tally.queries()]
        return [report for report in found if report is not None]

    def close(self) -> None:
        """Stop listening to tasks; what is known stays readable."""
        self.tally.close()
        self.coordination.close()
        if self._listener:
            self._listener.close()


_RATED_TOKENS = 2000  # fewer say more about starting than about speed
_lock = threading.Lock()
_installed: weakref.WeakKeyDictionary[SparkContext, Reports] = weakref.WeakKeyDictionary()


def install(spark: SparkSession) -> Reports:
    """The counters of this session's SparkContext, set up on the first call."""
    context = spark.sparkContext
    with _lock:
        for other, stale in list(_installed.items()):
            if other is not context and getattr(other, "_jsc", None) is None:  # stopped
                stale.close()
        if context not in _installed:
            _installed[context] = Reports(context)
            weakref.finalize(context, _installed[context].close)
        return _installed[context]


def reports(spark: SparkSession) -> list[Report]:
    """The reports of the application's queries with ``llm(...)`` (the last 1,000), oldest first."""
    known = _installed.get(spark.sparkContext)
    return known.all() if known else []


def last_report(spark: SparkSession) -> Report | None:
    """The report of the newest query with ``llm(...)``, None before the first."""
    known = _installed.get(spark.sparkContext)
    queries = known.tally.queries() if known else []
    return known.report(queries[-1]) if known and queries else None


def _listen(tally: Tally, address: DriverAddress) -> Listener | None:
    """Listen where executors reach the driver; on no network whose traffic the user wants encrypted."""
    if address.is_private:
        return None
    try:
        return Listener(tally, address.bind, address.host)
    except OSError as error:
        _log.warning("Reports lack queries that Spark ends early, and there is no progress line: %s", error)
        return None


class _Collecting:
    """The accumulator's parameter in a task: updates are a list."""

    def zero(self, value: list[TaskUpdate]) -> list[TaskUpdate]:
        return []

    def addInPlace(self, value: list[TaskUpdate], more: list[TaskUpdate]) -> list[TaskUpdate]:
        return value + more


class _Merging(_Collecting):
    """The same on the driver: updates go to the tally."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def addInPlace(self, value: list[TaskUpdate], more: list[TaskUpdate]) -> list[TaskUpdate]:
        for update in more:
            self._tally.merge(update)
        return []

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Collecting, ())
