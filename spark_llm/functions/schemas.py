"""Answer types as JSON Schemas and as words for the model; and JSON Schemas of users as answer types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spark_llm.answer_form import finite_json
from spark_llm.errors import LlmError
from spark_llm.functions import patterns
from spark_llm.functions.types import AnswerType, Field

Schema = dict[str, Any]

# JSON numbers are bounded, by what a float64 holds exactly where the bound is written: 15 digits, and powers of ten.
_DIGITS = 15
_PLACES = 10  # behind the point: the finest step that grammar libraries count in
_BOUNDS = {
    "TINYINT": (-(2**7), 2**7 - 1),
    "SMALLINT": (-(2**15), 2**15 - 1),
    "INT": (-(2**31), 2**31 - 1),
    "BIGINT": (-(10**18), 10**18),
    **dict.fromkeys(("FLOAT", "DOUBLE"), (-(10**_DIGITS - 1), 10**_DIGITS - 1)),
}
_PATTERNS = {"DATE": patterns.DATE, "TIMESTAMP": patterns.TIMESTAMP, "TIMESTAMP_NTZ": patterns.TIMESTAMP}
_WORDS = {
    "BOOLEAN": "true or false",
    "TINYINT": "integer",
    "SMALLINT": "integer",
    "INT": "integer",
    "BIGINT": "integer",
    "FLOAT": "number",
    "DOUBLE": "number",
    "DECIMAL": "number",
    "STRING": "text",
    "VARCHAR": "text",
    "DATE": '"YYYY-MM-DD"',
    "TIMESTAMP": '"YYYY-MM-DDThh:mm:ss"',
    "TIMESTAMP_NTZ": '"YYYY-MM-DDThh:mm:ss"',
}
_NUMBERS = {"number": "DOUBLE", "integer": "BIGINT"}
_FORMATS = {"date": "DATE", "date-time": "TIMESTAMP"}
_NOTES = {"title", "default", "examples", "deprecated", "$schema", "$id", "$comment"}  # nothing for an answer
_MAX_VALUES = 10_000  # of one answer, counted at its places; $ref can write a schema far larger than its text
_MAX_DEPTH = 32
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), ((dict,), "an object")),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "required", "enum"), ((list,), "an array")),
    **dict.fromkeys(("minimum", "maximum"), ((int, float), "a number")),
}  # of the keywords' values that are read here


def schema_of(answer: AnswerType) -> Schema:
    """The JSON Schema each of whose instances from_json reads as ``answer`` without a NULL that the model did not mean.

    A field may be null unless it is NOT NULL; all fields are there, in their order. BIGINT is kept within 10**18, FLOAT
    and DOUBLE to 15 digits before the point (a bound keeps exponents out, too: 1e999 is no number), and a DECIMAL to
    15 digits, 10 of them behind the point. Comments become descriptions.
    """
    name = answer.name
    if name == "STRUCT":
        return {
            "type": "object",
            "properties": {field.name: _field(field) for field in answer.fields},
            "required": [field.name for field in answer.fields],
            "additionalProperties": False,
        }
    if answer.element is not None:
        inner = schema_of(answer.element)
        return {"type": "array", "items": inner} if name == "ARRAY" else _map(inner)
    if name in _BOUNDS:
        minimum, maximum = _BOUNDS[name]
        kind = "number" if name in ("FLOAT", "DOUBLE") else "integer"
        return {"type": kind, "minimum": minimum, "maximum": maximum}
    if name == "DECIMAL":
        return _decimal(*answer.digits)
    if name == "BOOLEAN":
        return {"type": "boolean"}
    if name == "ENUM":
        return {"type": "string", "enum": list(answer.choices)}
    if name in _PATTERNS:
        return {"type": "string", "pattern": f"^(?:{_PATTERNS[name]})$"}
    return {"type": "string", "maxLength": answer.length} if name == "VARCHAR" else {"type": "string"}


def _field(field: Field) -> Schema:
    schema = schema_of(field.type)
    if field.nullable:
        schema = {"anyOf": [schema, {"type": "null"}]}
    return schema | ({"description": field.comment} if field.comment else {})


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _decimal(precision: int, scale: int) -> Schema:
    whole = min(precision - scale, max(_DIGITS - scale, 9))
    places = min(scale, _DIGITS - whole, _PLACES)
    most = float(f"{'9' * whole or '0'}.{'9' * places or '0'}")
    if not places:
        return {"type": "integer", "minimum": -int(most), "maximum": int(most)}
    return {"type": "number", "minimum": -most, "maximum": most, "multipleOf": float(f"1e-{places}")}


def words(answer: AnswerType) -> str:
    """The type as a model reads it: ``{"name": text, "age": integer or null (in years)}``."""
    if answer.name == "STRUCT":
        return "{" + ", ".join(_field_words(field) for field in answer.fields) + "}"
    if answer.name == "ENUM":
        return " or ".join(json.dumps(choice, ensure_ascii=False) for choice in answer.choices)
    if answer.element is None:
        return _WORDS[answer.name]
    inner = words(answer.element)
    return f"[{inner}, ...]" if answer.name == "ARRAY" else f"{{text: {inner}, ...}}"


def _field_words(field: Field) -> str:
    name = json.dumps(field.name, ensure_ascii=False)
    null = " or null" if field.nullable else ""
    comment = f" ({' '.join(field.comment.split())})" if field.comment else ""
    return f"{name}: {words(field.type)}{null}{comment}"


def read_schema(text: str) -> tuple[AnswerType, Schema]:
    """A user's JSON Schema -> the type of its answers, and the schema that the model is held to.

    The type of what has no counterpart in Spark (an object without properties, several alternatives) is STRING, its
    JSON text. The schema is the user's, with dates that exist and numbers that a BIGINT or a DOUBLE holds.
    LLM_INVALID_SCHEMA.
    """
    try:
        schema = finite_json(text)
        if not isinstance(schema, dict):
            raise LlmError("LLM_INVALID_SCHEMA", schema=_shown(text), reason="a JSON Schema is an object")
        return _Reader(schema, text).read()
    except ValueError as error:
        raise LlmError("LLM_INVALID_SCHEMA", schema=_shown(text), reason=f"it is no JSON ({error})") from None
    except RecursionError:
        raise LlmError("LLM_INVALID_SCHEMA", schema=_shown(text), reason="it is nested too deep") from None


def _shown(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."


class _Reader:
    """Reads one schema document; ``$ref`` may point to its parts."""

    def __init__(self, document: Schema, text: str) -> None:
        self._document = document
        self._text = text
        self._values = 0
        self._followed: list[str] = []  # references on the way from the document to the part that is read

    def read(self) -> tuple[AnswerType, Schema]:
        held = self._held(self._document)
        assert isinstance(held, dict)
        answer, _ = self._type(self._document, 0)
        return answer, held

    def _error(self, reason: str) -> LlmError:
        return LlmError("LLM_INVALID_SCHEMA", schema=_shown(self._text), reason=reason)

    def _type(self, schema: Any, depth: int) -> tuple[AnswerType, bool]:
        """The type of a schema's instances, and whether null is one of them."""
        text = AnswerType("STRING")
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return text, True  # true and {} allow anything
        self._values += 1
        if self._values > _MAX_VALUES:
            raise self._error(f"its answers have more than {_MAX_VALUES} values")
        if "$ref" in schema:
            target = self._target(schema["$ref"])
            if schema["$ref"] in self._followed or target is self._document:
                return text, True  # where a schema contains itself there is no end of columns
            self._followed.append(schema["$ref"])
            found = self._type(target, depth + 1)
            self._followed.pop()
            return found
        one = [part for part in schema.get("allOf", ()) if isinstance(part, Mapping)]
        if len(one) == 1 and "type" not in schema:
            return self._type(one[0], depth + 1)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                parts = [part for part in schema[word] if part != {"type": "null"}]
                null = len(parts) < len(schema[word])
                return (self._type(parts[0], depth + 1)[0], True) if len(parts) == 1 else (text, null)
        if "const" in schema or "enum" in schema:
            return self._constants([schema["const"]] if "const" in schema else schema["enum"])
        listed = _listed(schema)
        named = [kind for kind in listed if kind != "null"]
        null = len(named) < len(listed)
        return (self._typed(str(named[0]), schema, depth), null) if len(named) == 1 else (text, null)

    def _constants(self, values: list[Any]) -> tuple[AnswerType, bool]:
        known = [value for value in values if value is not None]
        null = len(known) < len(values)
        if known and all(isinstance(value, str) and value for value in known):
            return AnswerType("ENUM", choices=tuple(dict.fromkeys(known))), null
        if known and all(isinstance(value, bool) for value in known):
            return AnswerType("BOOLEAN"), null
        if known and all(_is_bigint(value) for value in known):
            return AnswerType("BIGINT"), null
        return AnswerType("STRING"), null

    def _typed(self, kind: str, schema: Mapping[str, Any], depth: int) -> AnswerType:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            element, _ = self._type(schema.get("items", {}), depth + 1)
            return AnswerType("ARRAY", element=element)
        if kind == "string":
            return AnswerType(_FORMATS.get(str(schema.get("format")), "STRING"))
        known = {**_NUMBERS, "boolean": "BOOLEAN"}
        return AnswerType(known.get(kind, "STRING"))

    def _object(self, schema: Mapping[str, Any], depth: int) -> AnswerType:
        properties = schema.get("properties") or {}
        more = schema.get("additionalProperties")
        if properties:
            if len({name.lower() for name in properties}) < len(properties):
                raise self._error("two properties differ in the case of letters only, which a STRUCT cannot tell apart")
            required = set(schema.get("required", ()))
            fields = []
            for name, part in properties.items():
                answer, null = self._type(part, depth + 1)
                comment = str(part.get("description", "")) if isinstance(part, Mapping) else ""
                fields.append(Field(name, answer, null or name not in required, comment))
            return AnswerType("STRUCT", fields=tuple(fields))
        if isinstance(more, Mapping):
            return AnswerType("MAP", element=self._type(more, depth + 1)[0])
        return AnswerType("STRING")

    def _target(self, reference: Any) -> Any:
        """The part of the document that a ``$ref`` points to."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise self._error(f"$ref {reference!r} points outside of the schema")
        part: Any = self._document
        for step in reference.removeprefix("#").strip("/").split("/") if reference.strip("#/") else []:
            name = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(part, Mapping) or name not in part:
                raise self._error(f"$ref {reference!r} points to nothing")
            part = part[name]
        return part

    def _held(self, schema: Any) -> Any:
        """The schema with what Spark needs beside the user's wishes; in Spark a missing field is a NULL anyway."""
        if isinstance(schema, list):
            return [self._held(part) for part in schema]
        if not isinstance(schema, Mapping):
            return schema
        for name in _KINDS.keys() & schema.keys():
            types, expected = _KINDS[name]
            if not isinstance(schema[name], types) or isinstance(schema[name], bool):
                raise self._error(f"{name} is {json.dumps(schema[name])[:40]}, which is not {expected}")
        held = {name: self._part(name, part) for name, part in schema.items() if name not in _NOTES}
        kinds = _listed(schema)
        if "string" in kinds and schema.get("format") in _FORMATS:
            del held["format"]
            held["pattern"] = f"^(?:{_PATTERNS[_FORMATS[schema['format']]]})$"
        number = next((name for kind, name in _NUMBERS.items() if kind in kinds), None)
        if number is not None and "enum" not in schema and "const" not in schema:
            minimum, maximum = _BOUNDS[number]
            self._check_limits(schema, number)
            held["minimum"] = max(minimum, schema.get("minimum", minimum))
            held["maximum"] = min(maximum, schema.get("maximum", maximum))
        if "object" in kinds and schema.get("properties"):
            held.setdefault("additionalProperties", False)
        return held

    def _check_limits(self, schema: Mapping[str, Any], number: str) -> None:
        """Refuses bounds that leave none of the numbers that answers can be."""
        low, high = _BOUNDS[number]
        edges = {"minimum": high, "exclusiveMinimum": high, "maximum": low, "exclusiveMaximum": low}
        for name in edges.keys() & schema.keys():
            bound, edge = schema[name], edges[name]
            if not isinstance(bound, int | float) or isinstance(bound, bool):
                continue
            past = bound > edge if edge == high else bound < edge
            if past or (bound == edge and name.startswith("exclusive")):
                limits = f"answers that are {number} lie between {low} and {high}"
                raise self._error(f"{name} is {bound}, but {limits}; a string with a pattern can hold more digits")

    def _part(self, name: str, part: Any) -> Any:
        if name in ("properties", "patternProperties", "$defs", "definitions"):
            return {each: self._held(schema) for each, schema in part.items()}
        return part if name in ("enum", "const", "required") else self._held(part)


def _listed(schema: Mapping[str, Any]) -> list[Any]:
    """The names in a schema's ``type``, None where it has none."""
    kinds = schema.get("type")
    return kinds if isinstance(kinds, list) else [kinds]


def _is_bigint(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
