"""What a rule may know beside the plan: the bridge, the session, its settings, and doors to what lies above it.

The optimizer imports neither the Spark surface nor the engine; what it needs of them comes in here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

from spark_llm.call import Budget, CallSpec
from spark_llm.optimizer.catalyst.bridge import Catalyst, Jvm
from spark_llm.optimizer.catalyst.notes import Notes
from spark_llm.optimizer.cost import EMBEDDED_TOKENS_PER_SECOND, Speed

if TYPE_CHECKING:
    from spark_llm.optimizer.statistics import Statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """One optimization of one query.

    session: the JVM's session. may_change_prompts: prompt rules may work (CONTRACTS.md 2). deduplicates: rows with
    equal arguments are asked once. explaining: the plan is
    wanted to be looked at, so that no job may run for it.
    statistics: of the inputs of calls. statistics_bytes: a job for them runs only where the tables below a call have
    less, 0: never. statistics_timeout: seconds that it may take.
    lengths(spec): counts tokens of texts as the model of a call reads them. function(tables): the JVM's Python function
    that answers calls, with the encoded order tables that specs name. group(tables, calls): the JVM's UDF that answers
    groups of as many calls. place(table, cuts, count): the JVM's UDF that
    gives rows their place by an encoded order table, in ranges for ``count`` partitions. tables: encoded order tables
    by digest, of this query and of others before it.
    tokens_per_second: of one engine; is_speed_measured: in this application or an earlier one, else it is a guess.
    rows_per_prompt: how many pairs of a join may share a prompt.
    slots: tasks that the application runs at a time. partitions: how many ReorderRows makes, 0: it decides.
    call_tasks: in how many of them, over all executors, a query's calls may run at a time, 0: in all.
    """

    catalyst: Catalyst
    session: Jvm
    may_change_prompts: bool
    deduplicates: bool
    explaining: bool
    statistics: Statistics
    statistics_bytes: int
    statistics_timeout: float
    lengths: Callable[[CallSpec], Callable[[Sequence[str]], list[int]]]
    function: Callable[[Mapping[str, bytes]], Jvm]
    group: Callable[[Mapping[str, bytes], int], Jvm]
    place: Callable[[bytes, bytes, int], Jvm]
    tables: MutableMapping[str, bytes]
    tokens_per_second: float
    slots: int
    call_tasks: int
    engines: int
    partitions: int
    window_rows: int
    max_output_length: int
    max_pairs: int
    rows_per_prompt: int
    budget: Budget
    notes: Notes = dataclasses.field(default_factory=Notes)
    is_speed_measured: bool = False

    @property
    def speed(self) -> Speed:
        """The engines' speed as the cost model takes it."""
        return Speed(self.tokens_per_second, self.is_speed_measured, self.engines)

    def speed_of(self, spec: CallSpec) -> Speed:
        """The speed of the engines that answer a call: encoders are others than those that answer prompts."""
        return Speed(EMBEDDED_TOKENS_PER_SECOND, engines=self.engines) if spec.task == "embed" else self.speed
