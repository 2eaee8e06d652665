"""What the plan rules get from the Spark surface: settings, statistics, Python functions, the engine's speed."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from spark_llm import placing
from spark_llm.call import Budget
from spark_llm.config import PREFIX, LlmConf, entries
from spark_llm.engine.text.lengths import Lengths, token_lengths
from spark_llm.optimizer.catalyst.bridge import Catalyst, Jvm
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.notes import Notes
from spark_llm.optimizer.rules import EARLY_RULES, RULES
from spark_llm.optimizer.statistics import Statistics

_REMEMBERED = 256  # order tables, and functions made for them
_TOKENS_PER_SECOND = 1000.0  # of an engine before any was measured


class Planner:
    """Makes the rules' Context; remembers statistics and order tables between the queries of one JVM.

    make(application, tables, calls): the pandas UDF that answers a group of so many calls, or one call where that is
    0. speed(application): tokens a second of all engines as measured, None before.
    """

    def __init__(
        self,
        catalyst: Catalyst,
        make: Callable[[str, Mapping[str, bytes], int], Any],
        speed: Callable[[str], float | None],
    ) -> None:
        self._catalyst = catalyst
        self._make = make
        self._speed = speed
        self.statistics = Statistics()
        self.tables: MutableMapping[str, bytes] = _Recent()
        self._functions = _Recent()
        self.notes = Notes()
        self._noting = threading.Lock()

    @contextlib.contextmanager
    def noting(self) -> Iterator[Notes]:
        """The rules' notes of what is optimized meanwhile, by one thread at a time."""
        with self._noting:
            before, self.notes = self.notes, Notes()
            try:
                yield self.notes
            finally:
                self.notes = before

    def forget_functions(self) -> None:
        """The UDF that answers calls is another from now on."""
        self._functions.clear()

    def context(self, session: Jvm, conf: LlmConf, explaining: bool) -> Context:
        """The rules' context for one query of a JVM session."""
        spark = session.sparkContext()
        application = str(spark.applicationId())
        engines = _engines(spark)

        def lengths(model: str | None) -> Lengths:
            return token_lengths(model or conf.model)

        def function(tables: Mapping[str, bytes]) -> Jvm:
            return self._functions.made(
                (application, *sorted(tables)), lambda: jvm_udf(self._make(application, tables, 0)).func()
            )

        def group(tables: Mapping[str, bytes], calls: int) -> Jvm:
            return self._functions.made(
                (application, calls, *sorted(tables)), lambda: jvm_udf(self._make(application, tables, calls))
            )

        def place(table: bytes, cuts: bytes, count: int) -> Jvm:
            return self._functions.made(
                (application, table, cuts, count), lambda: jvm_udf(placing.make_place_udf(table, cuts, count))
            )

        return Context(
            catalyst=self._catalyst,
            session=session,
            may_change_prompts=conf.may_change_prompts,
            explaining=explaining,
            statistics=self.statistics,
            statistics_bytes=conf.statistics_max_size if conf.statistics_enabled else 0,
            statistics_timeout=conf.statistics_timeout,
            lengths=lengths,
            function=function,
            group=group,
            place=place,
            tables=self.tables,
            tokens_per_second=(self._speed(application) or 0.0) / engines or _TOKENS_PER_SECOND,
            slots=int(spark.defaultParallelism()),
            engines=engines,
            partitions=conf.reorder_rows_partitions,
            window_rows=conf.window_rows,
            max_output_length=conf.max_output_length,
            max_pairs=conf.join_max_pairs,
            rows_per_prompt=conf.join_rows_per_prompt,
            budget=Budget(
                calls=conf.budget_max_calls,
                length=conf.budget_max_length,
                seconds=conf.budget_max_time,
                partial=conf.budget_on_exceeded == "partial",
            ),
            notes=self.notes,
        )


def _engines(spark: Jvm) -> int:
    """How many executors, with an engine each, the application has; the driver is one of its own block managers."""
    return 1 if spark.isLocal() else max(1, int(spark.getExecutorMemoryStatus().size()) - 1)


def enabled_rules(conf: LlmConf) -> set[str]:
    """The names of the rules that a configuration lets run."""
    keys = {rule.name: f"{PREFIX}optimizer.{rule.name}.enabled" for rule in (*EARLY_RULES, *RULES)}
    return {name for name, key in keys.items() if conf.optimizer_enabled and getattr(conf, entries()[key].attribute)}


def jvm_udf(udf: Any) -> Jvm:
    """The JVM's side of a pandas UDF, with its pickled function; it belongs to the running SparkContext."""
    return udf._unwrapped._judf


class _Recent(OrderedDict[Any, Any]):
    """A dict of the entries that were set last; threads may share it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    def __setitem__(self, key: Any, value: Any) -> None:
        with self._lock:
            super().__setitem__(key, value)
            self.move_to_end(key)
            while len(self) > _REMEMBERED:
                self.popitem(last=False)

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of ``key``, made if it is not there."""
        with self._lock:
            if key not in self:
                self[key] = make()
            return self[key]
