"""What the plan rules get from the Spark surface: settings, statistics, Python functions, the engine's speed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from spark_llm import placing
from spark_llm.config import PREFIX, LlmConf, entries
from spark_llm.engine.text.lengths import Lengths, token_lengths
from spark_llm.optimizer.catalyst.bridge import Catalyst, Jvm
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules import RULES
from spark_llm.optimizer.statistics import Statistics

_REMEMBERED = 256  # order tables, and functions made for them
_TOKENS_PER_SECOND = 1000.0  # of an engine before any was measured


class Planner:
    """Makes the rules' Context; remembers statistics and order tables between the queries of one JVM.

    make(application, tables): the pandas UDF that answers calls. speed(application): tokens a second of an engine as
    measured, None before.
    """

    def __init__(
        self,
        catalyst: Catalyst,
        make: Callable[[str, Mapping[str, bytes]], Any],
        speed: Callable[[str], float | None],
    ) -> None:
        self._catalyst = catalyst
        self._make = make
        self._speed = speed
        self.statistics = Statistics()
        self.tables: MutableMapping[str, bytes] = _Recent()
        self._functions = _Recent()

    def forget_functions(self) -> None:
        """The UDF that answers calls is another from now on."""
        self._functions.clear()

    def context(self, session: Jvm, conf: LlmConf, explaining: bool) -> Context:
        """The rules' context for one query of a JVM session."""
        spark = session.sparkContext()
        application = str(spark.applicationId())

        def lengths(model: str | None) -> Lengths:
            return token_lengths(model or conf.model)

        def function(tables: Mapping[str, bytes]) -> Jvm:
            key = (application, *sorted(tables))
            if key not in self._functions:
                self._functions[key] = jvm_udf(self._make(application, tables)).func()
            return self._functions[key]

        def place(table: bytes, cuts: bytes, count: int) -> Jvm:
            key = (application, table, cuts, count)
            if key not in self._functions:
                self._functions[key] = jvm_udf(placing.make_place_udf(table, cuts, count))
            return self._functions[key]

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
            place=place,
            tables=self.tables,
            tokens_per_second=self._speed(application) or _TOKENS_PER_SECOND,
            slots=int(spark.defaultParallelism()),
            partitions=conf.reorder_rows_partitions,
        )


def enabled_rules(conf: LlmConf) -> set[str]:
    """The names of the rules that a configuration lets run."""
    keys = {rule.name: f"{PREFIX}optimizer.{rule.name}.enabled" for rule in RULES}
    return {name for name, key in keys.items() if conf.optimizer_enabled and getattr(conf, entries()[key].attribute)}


def jvm_udf(udf: Any) -> Jvm:
    """The JVM's side of a pandas UDF, with its pickled function; it belongs to the running SparkContext."""
    return udf._unwrapped._judf


class _Recent(OrderedDict[Any, Any]):
    """A dict of the entries that were set or read last."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        self.move_to_end(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > _REMEMBERED:
            self.popitem(last=False)
