"""The plan rules, one a file. These tuples are what the optimizer does, in this order."""

from __future__ import annotations

from spark_llm.optimizer.catalyst.runner import Rule
from spark_llm.optimizer.rules.aggregate_distinct import aggregate_distinct
from spark_llm.optimizer.rules.count_pairs import count_pairs
from spark_llm.optimizer.rules.deduplicate_prompts import deduplicate_prompts
from spark_llm.optimizer.rules.embeddings_first import embeddings_first
from spark_llm.optimizer.rules.first_match import first_match
from spark_llm.optimizer.rules.fuse_calls import fuse_calls
from spark_llm.optimizer.rules.hold_task_slots import hold_task_slots
from spark_llm.optimizer.rules.keep_budget import keep_budget
from spark_llm.optimizer.rules.limit_before_calls import limit_before_calls
from spark_llm.optimizer.rules.limit_groups_before_calls import limit_groups_before_calls
from spark_llm.optimizer.rules.limit_into_filter import limit_into_filter
from spark_llm.optimizer.rules.llm_aggregates import aggregates_left, llm_aggregates
from spark_llm.optimizer.rules.mask_conditional_calls import mask_conditional_calls
from spark_llm.optimizer.rules.order_llm_predicates import order_llm_predicates
from spark_llm.optimizer.rules.place_calls_around_joins import place_calls_around_joins
from spark_llm.optimizer.rules.place_instruction import place_instruction
from spark_llm.optimizer.rules.reorder_columns import reorder_columns
from spark_llm.optimizer.rules.reorder_rows import reorder_rows
from spark_llm.optimizer.rules.reuse_answers import reuse_answers, share_answers
from spark_llm.optimizer.rules.rows_per_prompt import rows_per_prompt
from spark_llm.optimizer.rules.semantic_join import semantic_join
from spark_llm.optimizer.rules.shuffle_below_sort import shuffle_below_sort
from spark_llm.optimizer.rules.sort_calls_first import sort_calls_first

EARLY_RULES: tuple[Rule, ...] = (
    Rule("llmAggregates", llm_aggregates),  # makes calls that the others see; it has no key, without it there are none
    Rule("semanticJoin", semantic_join),
    Rule("maskConditionalCalls", mask_conditional_calls),
)
"""While Spark optimizes and calls stand in expressions: what changes a call's arguments, or Spark would refuse."""

RULES: tuple[Rule, ...] = (
    Rule("llmAggregates", aggregates_left),
    Rule("reuseAnswers", reuse_answers),
    Rule("limitBeforeCalls", sort_calls_first),
    Rule("limitBeforeCalls", limit_before_calls),
    Rule("limitBeforeCalls", limit_groups_before_calls),
    Rule("reuseAnswers", share_answers),
    Rule("placeCallsAroundJoins", place_calls_around_joins),
    Rule("aggregateDistinct", aggregate_distinct),
    Rule("semanticJoin", count_pairs),
    Rule("placeInstruction", place_instruction),  # changes prompts
    Rule("reorderColumns", reorder_columns),  # changes prompts
    Rule("semanticJoin", rows_per_prompt),  # changes prompts
    Rule("orderLlmPredicates", embeddings_first),
    Rule("orderLlmPredicates", order_llm_predicates),
    Rule("limitBeforeCalls", limit_into_filter),  # of the nodes that it made
    Rule("semanticJoin", first_match),  # of the nodes that they made
    Rule("fuseCalls", fuse_calls),
    Rule("deduplicatePrompts", deduplicate_prompts),
    Rule("reorderRows", reorder_rows),  # by the prompts that the others made
    Rule("shuffleBelowSort", shuffle_below_sort),
    Rule("holdTaskSlots", hold_task_slots),  # of the nodes as the others placed them
    Rule("keepBudget", keep_budget),  # of the calls that are left; it has no key, a budget always holds
)
"""Where calls are nodes of the plan."""
