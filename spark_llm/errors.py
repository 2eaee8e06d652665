"""The error conditions of spark-llm, in Spark's style: ``[CONDITION] message SQLSTATE: code``.

The catalogue is ``error_conditions.json`` beside this file: for each condition the message with
``<parameters>`` and its SQLSTATE. This module is a leaf: every part may import it.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    """All conditions: name -> ``{"message": ..., "sqlState": ...}``."""
    text = resources.files("spark_llm").joinpath("error_conditions.json").read_text("utf-8")
    conditions: dict[str, dict[str, str]] = json.loads(text)
    return conditions


class LlmError(Exception):
    """An error with a condition of the catalogue; ``str()`` is ``[CONDITION] message SQLSTATE: code``."""

    def __init__(self, condition: str, **parameters: Any) -> None:
        entry = catalogue()[condition]
        self.condition = condition
        self.parameters = {name: str(value) for name, value in parameters.items()}
        self.sql_state = entry["sqlState"]
        self.message = re.sub(r"<(\w+)>", lambda m: self.parameters.get(m.group(1), m.group(0)), entry["message"])
        super().__init__(f"[{condition}] {self.message} SQLSTATE: {self.sql_state}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.condition, self.parameters))


def _rebuild(condition: str, parameters: dict[str, str]) -> LlmError:
    return LlmError(condition, **parameters)
