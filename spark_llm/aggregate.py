"""The constants of an aggregate over answers, as they stand in a plan until ``rules/llm_aggregates.py`` makes calls."""

from __future__ import annotations

from typing import Literal

import msgspec

from spark_llm.errors import LlmError

AGGREGATE_NAME = "llm_aggregate"
"""The name of the PythonUDF that stands for an aggregate's input; it is never run."""

Option = str | int | float | bool | tuple[str, ...]


class AggregateSpec(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """An aggregate's constants. As JSON it is an array, which no UDF takes for the spec of a call.

    function: its name in SQL. prompt: asked about a chunk of texts, or (ai_top_k) about one. combine: asked about the
    answers of chunks. options: of each call. chunk_bytes: of UTF-8 that a prompt has of texts, at most. fan_in: answers
    that one prompt combines. k: how many texts are wanted.
    """

    function: Literal["ai_agg", "ai_summarize_agg", "ai_top_k"]
    prompt: str
    combine: str = ""
    options: dict[str, Option] = {}
    chunk_bytes: int = 0
    fan_in: int = 0
    k: int = 0

    def encode(self) -> str:
        """The JSON text that stands in the plan."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> AggregateSpec:
        """The inverse of ``encode``."""
        return msgspec.json.decode(text, type=AggregateSpec)

    def not_planned(self, reason: str) -> LlmError:
        """What a query fails with in which the aggregate is left as it was written."""
        return LlmError("LLM_AGGREGATE_NOT_PLANNED", function=self.function, reason=reason)
