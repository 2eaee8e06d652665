"""The text of one cell of a prompt. A leaf: planning needs it to measure cells, tasks to render them.

A cell is one line, ``name: value``. Text stands as it is where it can be taken for nothing else; quotes cost tokens
(benchmarks/prefix_order.py --part rendering), so they stand only where they tell something.
"""

from __future__ import annotations

import json
import re

from spark_llm.call import FieldSpec

# What a bare text could be taken for: JSON of another kind.
_LIKE_JSON = re.compile(r'["\[{]|(?:true|false|null|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\Z')


class FieldRenderer:
    """One field's values -> its lines; different values of a field give different lines."""

    def __init__(self, spec: FieldSpec) -> None:
        self._start = f"{_name(spec.name)}: "
        self._is_json = spec.json

    def __call__(self, value: str | None) -> str:
        if value is None:
            value = "null"
        elif not self._is_json:
            value = _text(value)
        return f"{self._start}{value}\n"


def whole_text(prompt: str | None) -> str:
    """A prompt without fields, as it is."""
    return prompt or ""


def instruction_line(prompt: str | None) -> str:
    """The prompt as a segment beside fields: whatever space stands around it becomes one newline behind it."""
    prompt = (prompt or "").strip()
    return f"{prompt}\n" if prompt else ""


def _text(value: str) -> str:
    """A text as it is, or as a JSON string where it is empty, has line breaks, control characters or outer space, or
    looks like JSON itself."""
    return value if _stands_alone(value) and not _LIKE_JSON.match(value) else json.dumps(value, ensure_ascii=False)


def _name(name: str) -> str:
    is_plain = _stands_alone(name) and ": " not in name and not name.startswith('"') and not name.endswith(":")
    return name if is_plain else json.dumps(name, ensure_ascii=False)


def _stands_alone(text: str) -> bool:
    return text.isprintable() and bool(text) and text[0] != " " and text[-1] != " "
