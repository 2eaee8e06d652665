"""Bounds of a user's JSON Schema at the edges of the numbers that answers can be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spark_llm.errors import LlmError
from spark_llm.functions.schemas import read_schema

MOST = {"integer": 10**18, "number": 10**15 - 1}


@pytest.mark.parametrize("kind", MOST)
def test_bounds_are_taken_to_what_answers_can_be(kind: str) -> None:
    most = MOST[kind]
    for given, held in (({}, (-most, most)), ({"minimum": most, "maximum": 2**70}, (most, most))):
        _, schema = read_schema(json.dumps({"type": kind, **given}))
        assert (schema["minimum"], schema["maximum"]) == held


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("name", ["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"])
def test_bounds_wholly_beyond_are_refused_with_the_bound_and_the_limits(kind: str, name: str) -> None:
    is_exclusive = name.startswith("exclusive")
    bound = (MOST[kind] + (not is_exclusive)) * (1 if name.endswith("inimum") else -1)
    part: dict[str, Any] = {"type": kind, name: bound}
    for schema in (part, {"type": "object", "properties": {"a": {"anyOf": [part, {"type": "null"}]}}}):
        with pytest.raises(LlmError, match=f"{name} is {bound}, .* between -{MOST[kind]} and {MOST[kind]}") as error:
            read_schema(json.dumps(schema))
        assert error.value.condition == "LLM_INVALID_SCHEMA"
    nearer = bound - (1 if bound > 0 else -1)
    read_schema(json.dumps({"type": kind, name: nearer}))
