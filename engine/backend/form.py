"""Constraints as OpenAI's structured outputs: a JSON schema whose root is an object, which all servers know.

Choices, regular expressions and schemas of other types become the one property of such an object, and are taken out of
it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from spark_llm.engine.constraints.matcher import KIND_NAMES, Matcher
from spark_llm.engine.request import Constraint
from spark_llm.errors import LlmError

_PROPERTY = "answer"
_SHARED = ("$defs", "definitions")  # parts that others refer to from the root, and stay there


class WrongAnswer(ValueError):
    """The server's answer does not keep to the format."""


class AnswerFormat:
    """What the server is asked to keep answers to. Raises LLM_INVALID_CONSTRAINT for what servers do not know.

    response_format: of the request, encoded as JSON. kind, forced, whole: see CompiledConstraint; nothing is known
    here of the server's tokens.
    """

    forced: tuple[int, ...] = ()
    whole = False
    trust = None

    def __init__(self, constraint: Constraint) -> None:
        self.kind = KIND_NAMES[constraint.kind]
        self._choices = frozenset(constraint.choices)
        schema = self._schema(constraint)
        self._wraps = schema.get("type") != "object"
        if self._wraps:
            shared = {name: schema[name] for name in _SHARED if name in schema}
            inner = {name: part for name, part in schema.items() if name not in _SHARED}
            schema = {
                "type": "object",
                "properties": {_PROPERTY: _moved(inner)},
                "required": [_PROPERTY],
                "additionalProperties": False,
                **_moved(shared),
            }
        self.response_format = msgspec.json.encode(
            {"type": "json_schema", "json_schema": {"name": _PROPERTY, "strict": True, "schema": schema}}
        )

    def start(self, output: Sequence[int]) -> Matcher:
        raise NotImplementedError("the server matches its tokens itself")

    def read(self, text: str) -> str:
        """The answer in a server's text. Raises WrongAnswer."""
        try:
            found: Any = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise WrongAnswer(f"the answer is no JSON: {error}") from error
        if not self._wraps:
            return text
        if not isinstance(found, dict) or _PROPERTY not in found:
            raise WrongAnswer(f"the answer has no {_PROPERTY!r}")
        answer = found[_PROPERTY]
        if self.kind == "JSON schema":
            return msgspec.json.encode(answer).decode()
        if not isinstance(answer, str):
            raise WrongAnswer("the answer is no text")
        if self._choices and answer not in self._choices:
            raise WrongAnswer("the answer is none of the choices")
        return answer

    def _schema(self, constraint: Constraint) -> dict[str, Any]:
        if constraint.kind == "choices":
            if not constraint.choices:
                raise self._invalid("there are none")
            return {"type": "string", "enum": list(constraint.choices)}
        if constraint.kind == "regex":
            return {"type": "string", "pattern": f"^({constraint.text})$"}
        if constraint.kind == "grammar":
            raise self._invalid("servers of OpenAI's protocol take no grammars: use a JSON schema")
        try:
            return msgspec.json.decode(constraint.text, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise self._invalid(str(error)) from error

    def _invalid(self, reason: str) -> LlmError:
        return LlmError("LLM_INVALID_CONSTRAINT", kind=self.kind, reason=reason)


def _moved(part: Any) -> Any:
    """A part of a schema that is no longer the root: its references to the root, or into it, say where that is now."""
    if isinstance(part, list):
        return [_moved(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    return {name: _reference(inner) if name == "$ref" else _moved(inner) for name, inner in part.items()}


def _reference(place: Any) -> Any:
    if not isinstance(place, str) or not place.startswith("#") or place.startswith(tuple(f"#/{at}/" for at in _SHARED)):
        return _moved(place)
    return f"#/properties/{_PROPERTY}{place[1:].rstrip('/')}"
