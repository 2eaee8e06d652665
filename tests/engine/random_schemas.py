"""Random JSON schemas, and whether a value keeps to one: only what the generated schemas say, by the specification."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st

NAMES = ["a", "title", "größe", "naïve key", 'quo"te', "back\\slash", "日本", "e\u0301", "x/y~z"]
TEXTS = ["", "yes", "no", "Ünïcode", "日本語", "emoji 🎬", 'say "hi"', "tab\there", "line\nbreak", "\\", "null", "7"]
INTEGERS = [0, 1, -1, 9, 10, 255, 2**31 - 1, -(2**31), 2**53, -(2**53), 2**63 - 1, -(2**63)]


@st.composite
def _integer(draw: st.DrawFn) -> dict[str, Any]:
    low, high = sorted(draw(st.tuples(st.sampled_from(INTEGERS), st.sampled_from(INTEGERS))))
    kind = draw(st.sampled_from(["both", "low", "high", "none"]))
    schema: dict[str, Any] = {"type": "integer"}
    if kind in ("both", "low"):
        schema["minimum"] = low
    if kind in ("both", "high"):
        schema["maximum"] = high
    return schema


@st.composite
def _number(draw: st.DrawFn) -> dict[str, Any]:
    low, high = sorted(draw(st.tuples(*[st.sampled_from([-1e3, -0.5, 0, 0.25, 1, 12.5, 1e3])] * 2)))
    if not draw(st.booleans()) or low == high:
        return {"type": "number"}
    return {"type": "number", "minimum": low, "maximum": high}


@st.composite
def _string(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["bounded", "pattern", "format"]))
    if kind == "pattern":
        return {"type": "string", "pattern": draw(st.sampled_from(["^[a-z]{1,3}$", "^(ja|nein)$", "^\\d{2}-\\d{2}$"]))}
    if kind == "format":
        return {"type": "string", "format": "date"}
    low = draw(st.integers(0, 4))
    return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 6))}


_CONSTANTS = st.sampled_from([*TEXTS, *INTEGERS[:6], True, False, None, 0.5])
_LEAVES = st.one_of(
    _integer(),
    _number(),
    _string(),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4, unique=True).map(lambda texts: {"enum": texts}),
    _CONSTANTS.map(lambda value: {"const": value}),
)


@st.composite
def _object(draw: st.DrawFn, parts: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.sampled_from(NAMES), parts, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def _array(draw: st.DrawFn, parts: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    low = draw(st.integers(0, 2))
    return {"type": "array", "items": draw(parts), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Nested objects and arrays with optional properties, unions, enums, unicode, numbers at their limits."""
    return st.recursive(
        _LEAVES,
        lambda parts: st.one_of(
            _object(parts),
            _array(parts),
            st.lists(parts, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
        ),
        max_leaves=6,
    )


def keeps_to(value: Any, schema: dict[str, Any]) -> bool:
    """Whether ``value`` is valid; of the keywords that ``schemas`` uses."""
    if "anyOf" in schema:
        return any(keeps_to(value, option) for option in schema["anyOf"])
    if "const" in schema:
        return type(value) is type(schema["const"]) and value == schema["const"]
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "object":
            known = schema["properties"]
            return (
                isinstance(value, dict)
                and all(name in value for name in schema["required"])
                and all(name in known and keeps_to(part, known[name]) for name, part in value.items())
            )
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(keeps_to(part, schema["items"]) for part in value)
            )
        case "integer" | "number" as kind:
            kinds = int if kind == "integer" else (int, float)
            return (
                isinstance(value, kinds)
                and not isinstance(value, bool)
                and schema.get("minimum", value) <= value <= schema.get("maximum", value)
            )
        case "string":
            return (
                isinstance(value, str)
                and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
                and re.search(schema.get("pattern", ""), value) is not None
                and ("format" not in schema or re.fullmatch(r"\d{4}-\d{2}-\d{2}", value) is not None)
            )
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
    raise AssertionError(f"unknown schema {schema}")


def parses(text: str, schema: dict[str, Any]) -> bool:
    """Whether ``text`` is JSON that keeps to the schema; NaN and infinities are none."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return keeps_to(json.loads(text, parse_constant=refuse), schema)
    except ValueError:
        return False
