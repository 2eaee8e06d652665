"""``llm`` and the AI functions on columns; the same calls as in SQL."""

from __future__ import annotations

from spark_llm.functions.columns import (
    ai_agg,
    ai_analyze_sentiment,
    ai_classify,
    ai_complete,
    ai_embed,
    ai_extract,
    ai_filter,
    ai_fix_grammar,
    ai_gen,
    ai_mask,
    ai_query,
    ai_similarity,
    ai_summarize,
    ai_summarize_agg,
    ai_top_k,
    ai_translate,
    llm,
    llm_prompt,
    try_llm,
)

__all__ = [
    "ai_agg",
    "ai_analyze_sentiment",
    "ai_classify",
    "ai_complete",
    "ai_embed",
    "ai_extract",
    "ai_filter",
    "ai_fix_grammar",
    "ai_gen",
    "ai_mask",
    "ai_query",
    "ai_similarity",
    "ai_summarize",
    "ai_summarize_agg",
    "ai_top_k",
    "ai_translate",
    "llm",
    "llm_prompt",
    "try_llm",
]
