"""How the value of a configuration key is written and read: text, booleans, numbers, Spark's sizes and times."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from spark_llm.errors import LlmError


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a value is written: ``expected`` names it in errors and docs, ``parse`` raises ValueError."""

    expected: str
    parse: Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configuration key; ``default`` is the text that a user would write."""

    attribute: str
    key: str
    default: str
    kind: Kind
    doc: str
    since: str

    def parse(self, text: str) -> Any:
        """The typed value of ``text``; LLM_INVALID_CONFIG if it is none."""
        try:
            return self.kind.parse(text.strip())
        except ValueError:
            raise LlmError("LLM_INVALID_CONFIG", key=self.key, value=repr(text), expected=self.kind.expected) from None


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[_one_of(text.lower(), ("true", "false"))]


def _one_of(text: str, choices: Iterable[str]) -> str:
    if text not in choices:
        raise ValueError
    return text


def _whole(text: str, minimum: int, maximum: int | None) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text) or int(text) < minimum or (maximum is not None and int(text) > maximum):
        raise ValueError
    return int(text)


_SIZES: dict[str, int] = {unit: 1024**power for power, unit in enumerate("bkmgtp")}
_TIMES: dict[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)(?:(b)|([kmgtp])b?)?", text.lower())
    if not match:
        raise ValueError
    return int(match[1]) * _SIZES[match[2] or match[3] or "b"]


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+)(us|ms|s|min|m|h|d)?", text.lower())
    if not match:
        raise ValueError
    return int(match[1]) * _TIMES[match[2] or "s"]


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+(,[0-9]+)*)?", text.lower()):
        raise ValueError
    return text.lower()


DEVICE = Kind("auto, cpu, cuda, cuda:<number> or cuda:<number>,<number>,…", _device)
TEXT = Kind("a text that is not empty", _text)
OPTIONAL_TEXT = Kind("a text", str)
BOOLEAN = Kind("true or false", _boolean)
SIZE = Kind("a whole number of bytes or a size such as 512m or 2g", _size)
TIME = Kind("a whole number of seconds or a time such as 500ms, 300s or 5m", _seconds)


def choice(*choices: str) -> Kind:
    """One of ``choices``, in any case of letters."""
    expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return Kind(expected, lambda text: _one_of(text.lower(), choices))


def integer(minimum: int, maximum: int | None = None) -> Kind:
    """A whole number of at least ``minimum``, and of at most ``maximum`` if that is given."""
    expected = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
    return Kind(f"a whole number of {expected}", functools.partial(_whole, minimum=minimum, maximum=maximum))


def key(name: str, kind: Kind, default: str, doc: str, since: str = "0.1.0") -> Any:
    """A field of a configuration dataclass: the key ``spark.llm.<name>``, whose default is as a user would write it."""
    metadata = {"name": name, "kind": kind, "default": default, "doc": doc, "since": since}
    return dataclasses.field(default=kind.parse(default), metadata=metadata)
