"""The keys of what a query may spend, and of the answers that it need not pay again."""

from __future__ import annotations

import dataclasses

from spark_llm.config_kinds import BOOLEAN, OPTIONAL_TEXT, SIZE, TIME, choice, integer, key


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpendingConf:
    """Result cache, budgets and joins on calls."""

    cache_enabled: bool = key(
        "cache.enabled",
        BOOLEAN,
        "true",
        "Answer rows that an earlier query asked alike from the result cache of the engine.",
    )
    cache_path: str = key(
        "cache.path",
        OPTIONAL_TEXT,
        "",
        "Folder in which answers are kept for later applications and other engines: a path or URI (file, hdfs, s3, "
        "gs ...) "
        "that all executors reach. Empty: in the memory of each engine only.",
    )
    cache_memory: int = key(
        "cache.memory",
        SIZE,
        "256m",
        "Memory of an engine's result cache; the answers used least recently go first.",
    )
    cache_max_size: int = key(
        "cache.maxSize",
        SIZE,
        "10g",
        "Most bytes of files below spark.llm.cache.path; the oldest go first. 0 is no limit.",
    )
    cache_cleared: int = key(
        "cache.cleared",
        integer(0),
        "0",
        "When spark_llm.clear_cache() was called last, in milliseconds since 1970; answers stored before do not count.",
    )
    budget_max_calls: int = key(
        "budget.maxCalls",
        integer(0),
        "0",
        "Most calls that one query may make; 0 is no limit.",
    )
    budget_max_length: int = key(
        "budget.maxLength",
        integer(0),
        "0",
        "Most tokens of prompts and answers, together, that one query may take; 0 is no limit.",
    )
    budget_max_time: float = key(
        "budget.maxTime",
        TIME,
        "0",
        "Longest time that one query may ask, from its first row on; 0 is no limit.",
    )
    budget_on_exceeded: str = key(
        "budget.onExceeded",
        choice("fail", "partial"),
        "fail",
        "What happens beyond the budget: `fail` refuses the query, before its first call where the estimate says so; "
        "`partial` gives NULL for the rest, which the report counts, and a rerun completes it from the result cache.",
    )
    join_max_pairs: int = key(
        "join.maxPairs",
        integer(0),
        "1000000",
        "Most pairs of rows that a join on a call's answer may ask about; 0 is no limit.",
    )
    join_rows_per_prompt: int = key(
        "join.rowsPerPrompt",
        integer(1, 64),
        "1",
        "How many right rows a join on a call's answer may show in one prompt, below their left row. Above 1 there are "
        "fewer calls, and answers may differ; only while spark.llm.optimizer.mayChangePrompts is true.",
    )
