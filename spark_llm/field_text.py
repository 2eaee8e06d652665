"""The text of one cell of a prompt. A leaf: planning needs it to measure cells, tasks to render them."""

from __future__ import annotations

import json
import re

from spark_llm.call import FieldSpec

_WORD = re.compile(r"[^\W\d]\w*")


class FieldRenderer:
    """One field's values -> its lines, ``name: <JSON value>`` and a newline."""

    def __init__(self, spec: FieldSpec) -> None:
        name = spec.name if _WORD.fullmatch(spec.name) else json.dumps(spec.name, ensure_ascii=False)
        self._start = f"{name}: "
        self._is_json = spec.json

    def __call__(self, value: str | None) -> str:
        if value is None:
            value = "null"
        elif not self._is_json:
            value = json.dumps(value, ensure_ascii=False)
        return f"{self._start}{value}\n"


def whole_text(prompt: str | None) -> str:
    """A prompt without fields, as it is."""
    return prompt or ""


def instruction_line(prompt: str | None) -> str:
    """The prompt as a segment beside fields: whatever space stands around it becomes one newline behind it."""
    prompt = (prompt or "").strip()
    return f"{prompt}\n" if prompt else ""
