"""The keys ``spark.llm.optimizer.*``: rules and their statistics."""

from __future__ import annotations

import dataclasses

from spark_llm.config_kinds import BOOLEAN, SIZE, TIME, integer, key


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConf:
    """What plan rules may do."""

    optimizer_enabled: bool = key(
        "optimizer.enabled",
        BOOLEAN,
        "true",
        "Let Catalyst rules change the plan of queries that call llm(). No rule changes which rows a query has.",
    )
    may_change_prompts: bool = key(
        "optimizer.mayChangePrompts",
        BOOLEAN,
        "true",
        "Let rules change the order of fields and the place of the instruction in prompts (reorderColumns, "
        "placeInstruction), so that prompts share more, and show several rows of a join in one where "
        "spark.llm.join.rowsPerPrompt says so. Off: each prompt is as the query writes it.",
    )
    place_instruction: bool = key(
        "optimizer.placeInstruction.enabled",
        BOOLEAN,
        "true",
        "Put the instruction behind the fields where several calls of a query ask about the same fields.",
    )
    reorder_columns: bool = key(
        "optimizer.reorderColumns.enabled",
        BOOLEAN,
        "true",
        "Put fields that repeat first in the prompt, by statistics. A call's `order => 'as_written'` wins over it.",
    )
    deduplicate_prompts: bool = key(
        "optimizer.deduplicatePrompts.enabled",
        BOOLEAN,
        "true",
        "Answer rows with equal arguments once per query.",
    )
    reorder_rows: bool = key(
        "optimizer.reorderRows.enabled",
        BOOLEAN,
        "true",
        "Bring rows whose prompts begin alike into one task, by a hash exchange, and sort them there.",
    )
    reorder_rows_partitions: int = key(
        "optimizer.reorderRows.partitions",
        integer(0),
        "0",
        "Partitions of that exchange; 0 makes as many as tasks run at a time, and more where a partition would keep "
        "an engine busy for over a minute.",
    )
    shuffle_below_sort: bool = key(
        "optimizer.shuffleBelowSort.enabled",
        BOOLEAN,
        "true",
        "Put an exchange between a global ORDER BY and the calls below it, which would run twice without one.",
    )
    mask_conditional_calls: bool = key(
        "optimizer.maskConditionalCalls.enabled",
        BOOLEAN,
        "true",
        "Ask only the rows whose answer a CASE, IF, coalesce, AND, OR or FILTER around a call needs.",
    )
    semantic_join: bool = key(
        "optimizer.semanticJoin.enabled",
        BOOLEAN,
        "true",
        "Run a join on a call's answer as pairs of rows that the join's other conditions leave, and make LEFT, "
        "RIGHT, FULL, SEMI and ANTI joins on a call work.",
    )
    reuse_answers: bool = key(
        "optimizer.reuseAnswers.enabled",
        BOOLEAN,
        "true",
        "Run a call that stands in several places of a query once.",
    )
    limit_before_calls: bool = key(
        "optimizer.limitBeforeCalls.enabled",
        BOOLEAN,
        "true",
        "Ask only the rows that a LIMIT leaves; where a filter on the answer stands between, in windows that grow "
        "until there are enough.",
    )
    place_calls_around_joins: bool = key(
        "optimizer.placeCallsAroundJoins.enabled",
        BOOLEAN,
        "true",
        "Run a call below a join that repeats its rows, and above one that drops them.",
    )
    aggregate_distinct: bool = key(
        "optimizer.aggregateDistinct.enabled",
        BOOLEAN,
        "true",
        "Group, count and unite the arguments of a call before it is asked, where only that is done with its answers.",
    )
    order_llm_predicates: bool = key(
        "optimizer.orderLlmPredicates.enabled",
        BOOLEAN,
        "true",
        "Run several conditions on calls as one, which asks the cheapest per dropped row first and rows that are "
        "dropped no more.",
    )
    fuse_calls: bool = key(
        "optimizer.fuseCalls.enabled",
        BOOLEAN,
        "true",
        "Run several calls over the same fields as one, next to each other for each row.",
    )
    hold_task_slots: bool = key(
        "optimizer.holdTaskSlots.enabled",
        BOOLEAN,
        "true",
        "Run the calls of a query in no more tasks at a time than spark.llm.tasksPerEngine says.",
    )
    statistics_enabled: bool = key(
        "optimizer.statistics.enabled",
        BOOLEAN,
        "true",
        "Let the rules run a Spark job for statistics of a call's input where the catalog has none: counts of rows "
        "and "
        "distinct values, hashes and lengths of a sample, beginnings of a few texts. Never for EXPLAIN, once for "
        "each "
        "input.",
    )
    statistics_max_size: int = key(
        "optimizer.statistics.maxSize",
        SIZE,
        "1g",
        "The job runs only where the files and cached tables below the call are smaller than this.",
    )
    statistics_timeout: float = key(
        "optimizer.statistics.timeout",
        TIME,
        "10s",
        "A job that takes longer is cancelled, and the rules go by what the plan alone tells.",
    )
