"""JSON schemas and other texts as grammars of llguidance, and what is wrong with those that are none.

Needs no tokenizer: whoever has a constraint's text can check it before any row is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from spark_llm.engine.constraints.grammar import one_line
from spark_llm.engine.constraints.matcher import KIND_NAMES
from spark_llm.engine.request import Constraint
from spark_llm.errors import LlmError

# Written as json.dumps writes: models know it best, what stands between values is forced, and an answer cannot be lost
# in white space.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MARKED = re.compile(r"regex parse error:\n {4}(.*)\n {4}( *)\^+\nerror: (.*)")
_SUBSCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def check(constraint: Constraint) -> None:
    """LLM_INVALID_CONSTRAINT for a constraint that no model could keep to."""
    if constraint.kind == "choices":
        if not constraint.choices:
            raise LlmError("LLM_INVALID_CONSTRAINT", kind="choices", reason="there are none")
        return
    grammar_of(constraint)


def grammar_of(constraint: Constraint, *, spaced: bool = False) -> str:
    """The constraint in llguidance's form. LLM_INVALID_CONSTRAINT says what is wrong, and where.

    spaced: a space stands before the answer; not where a grammar of its own says how answers begin.
    """
    kind, text = constraint.kind, constraint.text
    if kind == "json_schema":
        return _json_grammar(text, spaced)
    grammar: str = LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_lark(text)
    error = LLMatcher.validate_grammar(grammar)
    if error:
        reason = _fault(text, error) if kind == "regex" else one_line(error)
        raise LlmError("LLM_INVALID_CONSTRAINT", kind=KIND_NAMES[kind], reason=reason)
    return LLMatcher.grammar_from_regex(f" (?:{text})") if spaced and kind == "regex" else grammar


def _fault(pattern: str, error: str) -> str:
    """What llguidance says of a regular expression, and at which character of the user's it is.

    Its message shows the expression inside of a grammar of its own, with slashes escaped, and marks the place.
    """
    found = _MARKED.search(error)
    if found is None or found[1].replace("\\/", "/") != pattern.replace("\\/", "/"):
        said = error.partition("(in regex): ")[2] or error
        return one_line(said.partition("\n   1 |")[0])
    place = len(found[2]) - found[1][: len(found[2])].count("\\/") + pattern[: len(found[2])].count("\\/")
    return f"{found[3]} at character {place + 1}, before {pattern[place:][:20]!r}"


def _json_grammar(text: str, spaced: bool) -> str:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise LlmError(
            "LLM_INVALID_CONSTRAINT", kind=KIND_NAMES["json_schema"], reason=f"it is no JSON: {error}"
        ) from error
    wrong = _wrong(schema, schema)
    if wrong:
        place, wrong = _deepest(schema, schema, "", wrong)
        reason = f"{wrong} (at {place})" if place else wrong
        raise LlmError("LLM_INVALID_CONSTRAINT", kind=KIND_NAMES["json_schema"], reason=reason)
    if not spaced:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    whole = {"x-guidance": _JSON_OPTIONS} | (schema if isinstance(schema, dict) else {"anyOf": [schema]})
    return LLMatcher.grammar_from_lark(f'start: " " answer\nanswer: %json {json.dumps(whole)}')


def _wrong(schema: Any, root: Any) -> str:
    """What llguidance says of a part of the schema ``root``, "" if it is well."""
    if not isinstance(schema, (dict, bool)):
        return "a schema is an object, true or false"
    whole = {"anyOf": [schema], **{key: root[key] for key in ("$defs", "definitions") if key in root}}
    whole = schema if schema is root else whole
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(whole), overrides=_JSON_OPTIONS)
    except ValueError as error:
        return one_line(str(error))
    return one_line(LLMatcher.validate_grammar(grammar))


def _deepest(schema: Any, root: Any, place: str, error: str) -> tuple[str, str]:
    """The innermost part of a schema that is wrong, as a JSON pointer, and what is wrong with it."""
    for name, part in _parts(schema):
        inner = _wrong(part, root)
        if inner:
            return _deepest(part, root, f"{place}/{name}", inner)
    return place, error


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(schema, dict):
        return
    for key in _SUBSCHEMAS:
        if isinstance(schema.get(key), dict):
            yield key, schema[key]
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}/{at}", part) for at, part in enumerate(schema[key]))
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}/{_escaped(name)}", part) for name, part in schema[key].items())


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
