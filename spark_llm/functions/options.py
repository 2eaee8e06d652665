"""The named options of ``llm(...)``: which exist, and what their values may be."""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from spark_llm.errors import LlmError


@dataclasses.dataclass(frozen=True)
class Option:
    """``check`` gives the value as CallSpec holds it and raises ValueError if it is not ``expected``."""

    expected: str
    check: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _whole(minimum: float) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError
        return value

    return check


def _number(accepts: Callable[[float], bool]) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or not accepts(number):
            raise ValueError
        return number

    return check


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_text(value),)
    if not isinstance(value, Iterable) or not (found := tuple(_text(item) for item in value)):
        raise ValueError
    return found


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise ValueError
        return value.lower()

    return check


def _choices(value: Any) -> tuple[str, ...]:
    found = _texts(value)
    if isinstance(value, str) or len(set(found)) < len(found):
        raise ValueError
    return found


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


_TEXT = Option("a STRING that is not empty", _text)
_FLAG = Option("true or false", _flag)

OPTIONS: dict[str, Option] = {
    "model": _TEXT,
    "system": _TEXT,
    "max_tokens": Option("a whole number of at least 1", _whole(1)),
    "temperature": Option("a number of at least 0", _number(lambda x: x >= 0)),
    "top_p": Option("a number above 0 and at most 1", _number(lambda x: 0 < x <= 1)),
    "top_k": Option("a whole number of at least 0 (0 is no limit)", _whole(0)),
    "seed": Option("a whole number", _whole(-math.inf)),
    "stop": Option("a STRING or an ARRAY<STRING>, none of them empty", _texts),
    "order": Option("'auto' or 'as_written'", _one_of("auto", "as_written")),
    "returns": Option("a type, for example 'BOOLEAN' or 'STRUCT<name: STRING, age: INT>'", _text),
    "choices": Option("an ARRAY<STRING> of different texts, none of them empty; or a column of such arrays", _choices),
    "schema": Option("a JSON Schema, as a STRING", _text),
    "regex": Option("a regular expression, as a STRING", _text),
    "truncate": Option("'longest'", _one_of("longest")),
    "failOnError": _FLAG,
    "confidence": _FLAG,
    "usage": _FLAG,
}

_RESERVED = {name.lower(): name for name in OPTIONS}


def option_name(name: str) -> str | None:
    """The option that ``name`` is, in any case of letters as SQL names are, or None: then it names a field."""
    return _RESERVED.get(name.lower())


def check_option(name: str, value: Any) -> Any:
    """The checked value of an option. LLM_INVALID_OPTION."""
    try:
        return OPTIONS[name].check(value)
    except (TypeError, ValueError):
        raise LlmError("LLM_INVALID_OPTION", option=name, value=repr(value), expected=OPTIONS[name].expected) from None


def misspelt(name: str) -> str | None:
    """The option that ``name`` looks like a slip of (``max_token``, ``maxTokens``, ``temprature``), or None."""
    plain = {lower.replace("_", ""): option for lower, option in _RESERVED.items()}
    found = difflib.get_close_matches(re.sub("[^a-z]", "", name.lower()), plain, n=1, cutoff=0.8)
    return plain[found[0]] if found else None


def unknown_option(name: str) -> LlmError:
    """The error for a named argument that looks like an option and is none."""
    suggestion = misspelt(name) or "a field, which is an expression"
    return LlmError("LLM_UNKNOWN_OPTION", option=name, suggestion=suggestion, options=", ".join(OPTIONS))
