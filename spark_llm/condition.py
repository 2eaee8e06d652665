"""What a filter says about a row whose answers are known in part: true, false, NULL, or not known yet.

Conditions are JSON trees that a plan rule writes (``GroupSpec.conditions``). Spark evaluates the filter itself as ever;
a task uses them only to know which rows can be dropped, and how many rows the query gets. So whatever is not sure to be
as Spark has it (a lower case beyond ASCII, a number in an odd form) is unknown, as an answer is that was not asked yet.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from spark_llm.call import Condition


class Unknown(enum.Enum):
    """The type of ``UNKNOWN``."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN

Value = str | int | float | bool | None | Unknown

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?[0-9]{1,300}(\.[0-9]{1,300})?")
_BITS = {"int": 31, "bigint": 63}
_BOOLEANS = {"t": True, "true": True, "y": True, "yes": True, "1": True}
_BOOLEANS |= {"f": False, "false": False, "n": False, "no": False, "0": False}


def evaluate(condition: Condition, answers: Sequence[str | None], known: Sequence[bool]) -> bool | Unknown | None:
    """What ``condition`` is for a row with these answers; None is SQL's NULL.

    known: for each answer whether it was asked; one that was not may still become anything, also NULL. A result other
    than UNKNOWN holds whatever those answers become (three-valued logic of Kleene, with UNKNOWN as a fourth value).
    """
    found = _value(condition, answers, known)
    return found if found is None or isinstance(found, bool | Unknown) else UNKNOWN


def judge(conditions: Sequence[Condition], answers: Sequence[str | None], known: Sequence[bool]) -> bool | None:
    """True: all conditions hold for the row. False: one of them cannot hold any more. None: neither is sure."""
    holds: bool | None = True
    for condition in conditions:
        found = evaluate(condition, answers, known)
        if found is False or found is None:
            return False
        if found is UNKNOWN:
            holds = None
    return holds


def _value(tree: Condition, answers: Sequence[str | None], known: Sequence[bool]) -> Value:
    kind: str = tree[0]
    rest = tree[1:]
    if kind == "answer":
        return answers[rest[0]] if known[rest[0]] else UNKNOWN
    if kind == "literal":
        literal: Value = rest[0]
        return literal
    if kind in ("and", "or"):
        return _joined([_value(part, answers, known) for part in rest], kind == "or")
    first = _value(rest[0], answers, known)
    if kind in _COMPARISONS or kind in _OF_TWO_TEXTS:
        second = _value(rest[1], answers, known)
        if first is None or second is None:
            return None
        if kind in _COMPARISONS:
            return _compared(_COMPARISONS[kind], first, second)
        compare = _OF_TWO_TEXTS[kind]
        return compare(first, second) if isinstance(first, str) and isinstance(second, str) else UNKNOWN
    if kind == "<=>":
        return _same(first, _value(rest[1], answers, known))
    if first is UNKNOWN:
        return UNKNOWN
    if kind in ("isnull", "isnotnull"):
        return (first is None) == (kind == "isnull")
    if first is None:
        return None
    if kind == "not":
        return not first if isinstance(first, bool) else UNKNOWN
    if kind == "in":
        return _contained(first, rest[1])
    if kind == "cast":
        return _cast(first, rest[1])
    if kind == "json":
        return _member(first, rest[1], rest[2]) if isinstance(first, str) else UNKNOWN
    if kind == "like" and isinstance(first, str):
        pattern = _like(rest[1], rest[2])
        return pattern.fullmatch(first) is not None if pattern is not None else UNKNOWN
    return _OF_TEXT[kind](first) if kind in _OF_TEXT and isinstance(first, str) else UNKNOWN


def _joined(parts: Sequence[Value], absorbing: bool) -> Value:
    """AND (absorbing: False) or OR (True) of any number of values."""
    if any(part is absorbing for part in parts):
        return absorbing
    if not all(part is None or isinstance(part, bool) for part in parts):
        return UNKNOWN
    return None if None in parts else not absorbing


def _compared(compare: Callable[[Any, Any], bool], first: Value, second: Value) -> Value:
    """Texts by their bytes, which is by their code points. Numbers as Spark: NaN is equal to itself and above all."""
    if isinstance(first, str) and isinstance(second, str):
        return compare(first, second)
    if isinstance(first, bool) or isinstance(second, bool):
        return compare(first, second) if isinstance(first, bool) and isinstance(second, bool) else UNKNOWN
    if isinstance(first, int) and isinstance(second, int):
        return compare(first, second)
    if isinstance(first, int | float) and isinstance(second, int | float):
        return compare(_place(first), _place(second))
    return UNKNOWN


def _place(number: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(number) else (False, float(number))


def _same(first: Value, second: Value) -> Value:
    if first is UNKNOWN or second is UNKNOWN:
        return UNKNOWN
    if first is None or second is None:
        return first is second
    return _compared(operator.eq, first, second)


def _contained(value: Value, values: Sequence[Value]) -> Value:
    found = [None if other is None else _compared(operator.eq, value, other) for other in values]
    return _joined(found, True) if found else UNKNOWN


def _ascii(text: str, change: Callable[[str], str]) -> Value:
    return change(text) if text.isascii() else UNKNOWN


def _cast(value: Value, kind: str) -> Value:
    if isinstance(value, str):
        text = value.strip(" ")
        if kind in _BITS and _INTEGER.fullmatch(text):
            return _within(int(text), _BITS[kind])
        if kind == "double" and _NUMBER.fullmatch(text):
            return float(text)
        if kind == "boolean" and text.isascii():
            return _BOOLEANS.get(text.lower(), UNKNOWN)
        return value if kind == "string" else UNKNOWN
    if isinstance(value, bool):
        casts: dict[str, Value] = {"string": str(value).lower(), "boolean": value}
        return casts.get(kind, UNKNOWN)
    if isinstance(value, int):
        if kind in _BITS:
            return _within(value, _BITS[kind])
        casts = {"string": str(value), "double": float(value)}
        return casts.get(kind, UNKNOWN)
    return value if isinstance(value, float) and kind == "double" else UNKNOWN


def _member(text: str, path: Sequence[str], kind: str) -> Value:
    """A value within a typed answer, which is a JSON object, as from_json reads it."""
    found = _parsed(text)
    for name in path:
        if found is None:
            return None
        if not isinstance(found, dict):
            return UNKNOWN
        found = found.get(name)
    if found is None or (kind == "string" and isinstance(found, str)):
        return found
    if isinstance(found, bool):
        return found if kind == "boolean" else UNKNOWN
    if isinstance(found, int) and kind in _BITS:
        return _within(found, _BITS[kind])
    is_number = isinstance(found, float) or (isinstance(found, int) and _within(found, 63) is not UNKNOWN)
    return float(found) if is_number and kind == "double" else UNKNOWN


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """The JSON value; UNKNOWN for what is none. Nobody may change it."""
    try:
        return json.loads(text)
    except ValueError:
        return UNKNOWN


def _within(number: int, bits: int) -> Value:
    return number if -(1 << bits) <= number < 1 << bits else UNKNOWN


@functools.lru_cache(maxsize=256)
def _like(pattern: str, escape: str) -> re.Pattern[str] | None:
    """A LIKE pattern as a regular expression; None where Spark would refuse it, or goes by halves of characters."""
    if any(character > "\uffff" for character in pattern):
        return None
    parts = []
    characters = iter(pattern)
    for character in characters:
        if character == escape:
            escaped = next(characters, None)
            if escaped is None or escaped not in ("_", "%", escape):
                return None
            parts.append(re.escape(escaped))
        else:
            parts.append({"_": ".", "%": ".*"}.get(character) or re.escape(character))
    return re.compile("".join(parts), re.DOTALL)


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OF_TWO_TEXTS: dict[str, Callable[[str, str], bool]] = {
    "startswith": str.startswith,
    "endswith": str.endswith,
    "contains": operator.contains,
}
_OF_TEXT: dict[str, Callable[[str], Value]] = {
    "lower": lambda text: _ascii(text, str.lower),
    "upper": lambda text: _ascii(text, str.upper),
    "trim": lambda text: text.strip(" "),
    "length": len,
}
