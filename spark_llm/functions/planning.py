"""What the plan rules get from the Spark surface: settings, statistics, Python functions, the engine's speed."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from spark_llm import placing, speed
from spark_llm.call import Budget, CallSpec
from spark_llm.config import PREFIX, LlmConf, entries
from spark_llm.engine.text.lengths import Lengths, token_lengths
from spark_llm.functions.task_slots import call_tasks
from spark_llm.optimizer.catalyst.bridge import Catalyst, Jvm
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.catalyst.notes import Notes
from spark_llm.optimizer.cost import TOKENS_PER_SECOND
from spark_llm.optimizer.rules import EARLY_RULES, RULES
from spark_llm.optimizer.statistics import Statistics

_REMEMBERED = 256  # order tables, and functions made for them

Measured = Callable[[str], float | None]
"""An application's id -> tokens a second of all its engines as its reports have them, None before one was measured."""


class Planner:
    """Makes the rules' Context; remembers statistics and order tables between the queries of one JVM.

    make(application, tables, calls): the pandas UDF that answers a group of so many calls, or one call where that is
    0. measured: the engines' speed.
    """

    def __init__(
        self,
        catalyst: Catalyst,
        make: Callable[[str, Mapping[str, bytes], int], Any],
        measured: Measured,
    ) -> None:
        self._catalyst = catalyst
        self._make = make
        self._speed = _Speed(measured)
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
        engines = _engines(spark) * conf.engines_per_executor
        engine = speed.engine_name(conf.model, _arithmetic(conf), conf.device, conf.threads, str(spark.master()))
        measured = self._speed.of(application, engine, engines)

        def lengths(spec: CallSpec) -> Lengths:
            if spec.task == "embed":
                return token_lengths(spec.model or conf.embedding_model, spec.task)
            if spec.model is not None and spec.model != conf.model:
                self._speed.is_of_several(application)
            return token_lengths(spec.model or conf.model)

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
            deduplicates=conf.deduplicate_prompts,
            explaining=explaining,
            statistics=self.statistics,
            statistics_bytes=conf.statistics_max_size if conf.statistics_enabled else 0,
            statistics_timeout=conf.statistics_timeout,
            lengths=lengths,
            function=function,
            group=group,
            place=place,
            tables=self.tables,
            tokens_per_second=measured or TOKENS_PER_SECOND,
            is_speed_measured=measured is not None,
            slots=int(spark.defaultParallelism()),
            call_tasks=call_tasks(spark, _engines(spark), conf.tasks_per_engine),
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


class _Speed:
    """Tokens a second of one engine: measured in the application, else remembered from an earlier one.

    Reports do not tell models apart, so only an application that has used one kind of engine leaves its speed behind.
    """

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._engines: dict[str, dict[str, int]] = {}  # application -> the names of its engines, how many
        self._known: dict[str, float] = {}
        atexit.register(self._remember)

    def of(self, application: str, engine: str, engines: int) -> float | None:
        self._engines.setdefault(application, {})[engine] = engines
        measured = self._measured(application)
        if measured is not None:
            return measured / engines
        if engine not in self._known:
            self._known[engine] = speed.remembered(engine) or 0.0
        return self._known[engine] or None

    def is_of_several(self, application: str) -> None:
        """The application uses another model, too."""
        self._engines.setdefault(application, {})["another"] = 1

    def _remember(self) -> None:
        for application, names in self._engines.items():
            measured = self._measured(application)
            if measured is not None and len(names) == 1:
                [(engine, engines)] = names.items()
                speed.remember(engine, measured / engines)


def _arithmetic(conf: LlmConf) -> str:
    """What decides how fast a device computes, beside the device."""
    return f"{conf.dtype}{' fp8' * (conf.quantization == 'fp8')}{' deterministic' * conf.deterministic}"


def _engines(spark: Jvm) -> int:
    """How many executors, with an engine each, the application has; the driver is one of its own block managers."""
    return 1 if spark.isLocal() else max(1, int(spark.getExecutorMemoryStatus().size()) - 1)


def enabled_rules(conf: LlmConf) -> set[str]:
    """The names of the rules that a configuration lets run. A rule without a key of its own always runs."""
    keys = {rule.name: f"{PREFIX}optimizer.{rule.name}.enabled" for rule in (*EARLY_RULES, *RULES)}
    known = entries()
    return {
        name
        for name, key in keys.items()
        if key not in known or (conf.optimizer_enabled and getattr(conf, known[key].attribute))
    }


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
