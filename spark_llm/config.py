"""The ``spark.llm.*`` configuration: one typed table, which is the dataclass ``LlmConf``.

Each field is one key with its default, its kind and its documentation; parsing, validation, the SQL ``SET``
surface, ``enable(spark, **options)`` and docs/configuration.md all read this table.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spark_llm.config_kinds import BOOLEAN, OPTIONAL_TEXT, SIZE, TEXT, TIME, Entry, Kind, choice, integer
from spark_llm.cores import executor_cores, usable_cores
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_llm.engine.config import EngineSpec

PREFIX = "spark.llm."


def _key(name: str, kind: Kind, default: str, doc: str, since: str = "0.1.0") -> Any:
    metadata = {"name": name, "kind": kind, "default": default, "doc": doc, "since": since}
    return dataclasses.field(default=kind.parse(default), metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmConf:
    """The typed values of all ``spark.llm.*`` keys. Sizes are bytes, times are seconds.

    ``task_cores`` is no key: the cores of the executor that this was read in, 0 where it was not read in one.
    """

    model: str = _key(
        "model",
        TEXT,
        "default",
        "The model that answers: `default` (the packaged SmolLM2-135M-Instruct), a folder with `config.json` "
        "and `*.safetensors`, a `.gguf` file, or a Hugging Face id. A call's `model => …` wins over it.",
    )
    max_output_length: int = _key(
        "maxOutputLength",
        integer(1),
        "64",
        "Most tokens of an answer where the call has no `max_tokens => …`.",
    )
    on_error: str = _key(
        "onError",
        choice("null", "fail"),
        "null",
        "What a row that cannot be answered (for example a prompt longer than the context) gives: `null` is "
        "NULL, counted in the report; `fail` ends the query with the row's error.",
    )
    window_rows: int = _key(
        "windowRows",
        integer(1),
        "4096",
        "Rows that a task folds, orders and sends to the engine at a time. More rows share more prefixes "
        "and take more memory in the Python worker.",
    )
    windows_in_flight: int = _key(
        "windowsInFlight",
        integer(1),
        "2",
        "Windows of a task that the engine holds at a time; with 2 it never waits for the next one.",
    )
    progress: str = _key(
        "progress",
        choice("auto", "true", "false"),
        "auto",
        "Show a progress line (rows, tokens per second, time left) while calls run; `auto` shows it on a terminal.",
    )
    optimizer_enabled: bool = _key(
        "optimizer.enabled",
        BOOLEAN,
        "true",
        "Let Catalyst rules change the plan of queries that call llm(). No rule changes which rows a query has.",
    )
    may_change_prompts: bool = _key(
        "optimizer.mayChangePrompts",
        BOOLEAN,
        "true",
        "Let rules change the order of fields and the place of the instruction in prompts (reorderColumns, "
        "placeInstruction), so that prompts share more. Off: each prompt is as the query writes it.",
    )
    place_instruction: bool = _key(
        "optimizer.placeInstruction.enabled",
        BOOLEAN,
        "true",
        "Put the instruction behind the fields where several calls of a query ask about the same fields.",
    )
    reorder_columns: bool = _key(
        "optimizer.reorderColumns.enabled",
        BOOLEAN,
        "true",
        "Put fields that repeat first in the prompt, by statistics. A call's `order => 'as_written'` wins over it.",
    )
    deduplicate_prompts: bool = _key(
        "optimizer.deduplicatePrompts.enabled",
        BOOLEAN,
        "true",
        "Answer rows with equal arguments once per query.",
    )
    reorder_rows: bool = _key(
        "optimizer.reorderRows.enabled",
        BOOLEAN,
        "true",
        "Bring rows whose prompts begin alike into one task, by a hash exchange, and sort them there.",
    )
    reorder_rows_partitions: int = _key(
        "optimizer.reorderRows.partitions",
        integer(0),
        "0",
        "Partitions of that exchange; 0 makes as many as tasks run at a time, and more where a partition would keep "
        "an engine busy for over a minute.",
    )
    shuffle_below_sort: bool = _key(
        "optimizer.shuffleBelowSort.enabled",
        BOOLEAN,
        "true",
        "Put an exchange between a global ORDER BY and the calls below it, which would run twice without one.",
    )
    mask_conditional_calls: bool = _key(
        "optimizer.maskConditionalCalls.enabled",
        BOOLEAN,
        "true",
        "Ask only the rows whose answer a CASE, IF, coalesce, AND, OR or FILTER around a call needs.",
    )
    semantic_join: bool = _key(
        "optimizer.semanticJoin.enabled",
        BOOLEAN,
        "true",
        "Run a join on a call's answer as pairs of rows that the join's other conditions leave, and make LEFT, RIGHT, FULL, SEMI and ANTI joins on a call work.",
    )
    reuse_answers: bool = _key(
        "optimizer.reuseAnswers.enabled",
        BOOLEAN,
        "true",
        "Run a call that stands in several places of a query once.",
    )
    limit_before_calls: bool = _key(
        "optimizer.limitBeforeCalls.enabled",
        BOOLEAN,
        "true",
        "Ask only the rows that a LIMIT leaves; where a filter on the answer stands between, in windows that grow until there are enough.",
    )
    place_calls_around_joins: bool = _key(
        "optimizer.placeCallsAroundJoins.enabled",
        BOOLEAN,
        "true",
        "Run a call below a join that repeats its rows, and above one that drops them.",
    )
    aggregate_distinct: bool = _key(
        "optimizer.aggregateDistinct.enabled",
        BOOLEAN,
        "true",
        "Group, count and unite the arguments of a call before it is asked, where only that is done with its answers.",
    )
    order_llm_predicates: bool = _key(
        "optimizer.orderLlmPredicates.enabled",
        BOOLEAN,
        "true",
        "Run several conditions on calls as one, which asks the cheapest per dropped row first and rows that are dropped no more.",
    )
    fuse_calls: bool = _key(
        "optimizer.fuseCalls.enabled",
        BOOLEAN,
        "true",
        "Run several calls over the same fields as one, next to each other for each row.",
    )
    statistics_enabled: bool = _key(
        "optimizer.statistics.enabled",
        BOOLEAN,
        "true",
        "Let the rules run a Spark job for statistics of a call's input where the catalog has none: counts of rows and "
        "distinct values, hashes and lengths of a sample, beginnings of a few texts. Never for EXPLAIN, once for each "
        "input.",
    )
    statistics_max_size: int = _key(
        "optimizer.statistics.maxSize",
        SIZE,
        "1g",
        "The job runs only where the files and cached tables below the call are smaller than this.",
    )
    statistics_timeout: float = _key(
        "optimizer.statistics.timeout",
        TIME,
        "10s",
        "A job that takes longer is cancelled, and the rules go by what the plan alone tells.",
    )
    cache_enabled: bool = _key(
        "cache.enabled",
        BOOLEAN,
        "true",
        "Answer rows that an earlier query asked alike from the result cache of the engine.",
    )
    cache_path: str = _key(
        "cache.path",
        OPTIONAL_TEXT,
        "",
        "Folder in which answers are kept for later applications and other engines: a path or URI (file, hdfs, s3, gs ...) "
        "that all executors reach. Empty: in the memory of each engine only.",
    )
    cache_memory: int = _key(
        "cache.memory",
        SIZE,
        "256m",
        "Memory of an engine's result cache; the answers used least recently go first.",
    )
    cache_max_size: int = _key(
        "cache.maxSize",
        SIZE,
        "10g",
        "Most bytes of files below spark.llm.cache.path; the oldest go first. 0 is no limit.",
    )
    cache_cleared: int = _key(
        "cache.cleared",
        integer(0),
        "0",
        "When spark_llm.clear_cache() was called last, in milliseconds since 1970; answers stored before do not count.",
    )
    budget_max_calls: int = _key(
        "budget.maxCalls",
        integer(0),
        "0",
        "Most calls that one query may make; 0 is no limit.",
    )
    budget_max_length: int = _key(
        "budget.maxLength",
        integer(0),
        "0",
        "Most tokens of prompts and answers, together, that one query may take; 0 is no limit.",
    )
    budget_max_time: float = _key(
        "budget.maxTime",
        TIME,
        "0",
        "Longest time that one query may ask, from its first row on; 0 is no limit.",
    )
    budget_on_exceeded: str = _key(
        "budget.onExceeded",
        choice("fail", "partial"),
        "fail",
        "What happens beyond the budget: `fail` refuses the query, before its first call where the estimate says so; "
        "`partial` gives NULL for the rest, which the report counts, and a rerun completes it from the result cache.",
    )
    join_max_pairs: int = _key(
        "join.maxPairs",
        integer(0),
        "1000000",
        "Most pairs of rows that a join on a call's answer may ask about; 0 is no limit.",
    )
    join_rows_per_prompt: int = _key(
        "join.rowsPerPrompt",
        integer(1),
        "1",
        "Right rows that one prompt of such a join asks about. More than 1 changes the prompts.",
    )
    dtype: str = _key(
        "engine.dtype",
        choice("auto", "float32", "bfloat16", "float16"),
        "auto",
        "Number format of weights and computation; `auto` takes the fastest one that the machine computes in hardware.",
    )
    kv_cache_memory: int = _key(
        "engine.kvCacheMemory",
        SIZE,
        "0",
        "Memory of the key/value cache of one engine, which prompts share; 0 lets the engine choose from the "
        "free memory.",
    )
    max_batch_tokens: int = _key(
        "engine.maxBatchTokens",
        integer(0),
        "0",
        "Most tokens that an engine computes in one step; 0 lets the engine choose. (Spark shows the value "
        "redacted in `SET`, because the name holds the word token.)",
    )
    max_running_rows: int = _key(
        "engine.maxRunningRows",
        integer(1),
        "256",
        "Most rows that an engine works on at a time.",
    )
    page_size: int = _key(
        "engine.pageSize",
        integer(1),
        "1",
        "Tokens of a page of the key/value cache. Prompts share whole pages.",
    )
    context_length: int = _key(
        "engine.contextLength",
        integer(0),
        "0",
        "Most tokens of prompt and answer together; 0 is what the model was made for.",
    )
    threads: int = _key(
        "engine.threads",
        integer(0),
        "0",
        "CPU threads of one engine; 0 takes as many as the executor has cores.",
    )
    idle_timeout: float = _key(
        "engine.idleTimeout",
        TIME,
        "5m",
        "An engine without work ends after this time and frees its memory; 0 keeps it until its executor ends.",
    )
    start_timeout: float = _key(
        "engine.startTimeout",
        TIME,
        "10m",
        "How long a task waits for an engine to load its model.",
    )
    prefix_cache: bool = _key(
        "engine.prefixCache",
        BOOLEAN,
        "true",
        "Reuse the computed prefix of earlier prompts. Off is for measuring what it saves.",
    )
    check_invariants: bool = _key(
        "engine.checkInvariants",
        BOOLEAN,
        "false",
        "Check the engine's bookkeeping after every step; slow, for finding bugs.",
    )
    task_cores: int = 0

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> LlmConf:
        """The configuration in ``settings`` (other keys than ``spark.llm.*`` only say the executor's cores).

        Raises LlmError LLM_UNKNOWN_CONFIG (with the nearest key) or LLM_INVALID_CONFIG.
        """
        values: dict[str, Any] = {"task_cores": executor_cores(settings)}
        for key, text in settings.items():
            if key.startswith(PREFIX):
                entry = entries().get(key) or _unknown(key)
                values[entry.attribute] = entry.parse(text)
        return cls(**values)

    def engine_spec(self, model: str | None = None) -> EngineSpec:
        """What an engine for ``model`` (default: ``spark.llm.model``) is started with on this machine."""
        from spark_llm.engine.config import EngineSpec

        return EngineSpec(
            model=model or self.model,
            dtype=self.dtype,  # type: ignore[arg-type]
            kv_cache_memory=self.kv_cache_memory,
            max_batch_tokens=self.max_batch_tokens,
            max_running_rows=self.max_running_rows,
            page_size=self.page_size,
            context_length=self.context_length,
            threads=self.threads or max(1, min(self.task_cores or usable_cores(), usable_cores())),
            idle_timeout=self.idle_timeout,
            check_invariants=self.check_invariants,
        )


@functools.cache
def entries() -> dict[str, Entry]:
    """All keys in their order: ``spark.llm.…`` -> Entry."""
    table = {}
    for field in dataclasses.fields(LlmConf):
        if field.metadata:
            about = dict(field.metadata)
            key = PREFIX + about.pop("name")
            table[key] = Entry(attribute=field.name, key=key, **about)
    return table


def from_session(spark: SparkSession) -> LlmConf:
    """The configuration of a session as it is now: ``SET`` and ``spark.conf`` over the session's builder."""
    return LlmConf.parse(dict(spark.conf.getAll))


def from_task() -> LlmConf:
    """The configuration that the query of the running Spark task was started with; only in a Python worker."""
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        raise RuntimeError("from_task() outside of a Spark task")
    keys = [*entries(), "spark.master", "spark.executor.cores"]
    found = {key: context.getLocalProperty(key) for key in keys}
    return LlmConf.parse({key: text for key, text in found.items() if text is not None})


def option_settings(options: Mapping[str, Any]) -> dict[str, str]:
    """Keyword options of ``enable()`` and ``session()`` as ``spark.llm.*`` settings, validated.

    A name is a key (``"spark.llm.engine.dtype"``), a key without its prefix (``"engine.dtype"``) or snake case
    (``engine_dtype``). A value is text or the Python value; None leaves the key as it is.
    """
    names = {name: entry for entry in entries().values() for name in _names(entry.key)}
    settings = {}
    for name, value in options.items():
        entry = names.get(name) or _unknown(name)
        if value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            entry.parse(text)
            settings[entry.key] = text
    return settings


def _names(key: str) -> tuple[str, str, str]:
    short = key.removeprefix(PREFIX)
    return key, short, _snake(short)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace(".", "_").lower()


def _unknown(name: str) -> Entry:
    """Raise LLM_UNKNOWN_CONFIG; the suggestion is written in the style of ``name``."""
    style = 0 if name.startswith(PREFIX) else 1 if "." in name else 2
    known = [_names(key)[style] for key in entries()]
    suggestion = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise LlmError("LLM_UNKNOWN_CONFIG", key=name, suggestion=suggestion)
