"""Named prompts: a text and its options that queries refer to by name, ``llm_prompt('sentiment', review)``.

They live in the driver, for all its sessions, like a function's code. A query takes the text when it is analysed: a
view that names a prompt follows its changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import threading
from typing import Any

from spark_llm.errors import LlmError
from spark_llm.functions.answer import answer_of
from spark_llm.functions.options import check_option, option_name, unknown_option
from spark_llm.functions.python_types import plain_options

_lock = threading.Lock()
_prompts: dict[str, Prompt] = {}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt with the options that its calls have where they do not say otherwise."""

    name: str
    text: str
    options: dict[str, Any]


def prompt(name: str, text: str, **options: Any) -> Prompt:
    """Define or replace the prompt ``name``, whatever the case of its letters.

    >>> spark_llm.prompt("sentiment", "How does the reviewer feel?", choices=["good", "bad"])
    >>> spark.sql("SELECT llm_prompt('sentiment', review) FROM reviews")

    options: as of ``spark_llm.functions.llm``. Raises LLM_INVALID_ARGUMENT, LLM_UNKNOWN_OPTION, LLM_INVALID_OPTION and
    what is wrong with a type or schema.
    """
    for argument, value in (("name", name), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            raise LlmError("LLM_INVALID_ARGUMENT", value=repr(value), argument=argument, expected="a text")
    checked = {}
    for option, value in plain_options(options).items():
        known = option_name(option)
        if known is None:
            raise unknown_option(option)
        if value is not None:
            checked[known] = check_option(known, value)
    answer_of(checked)
    found = Prompt(name, text, checked)
    with _lock:
        _prompts[name.lower()] = found
    return found


def prompt_named(name: str) -> Prompt:
    """The prompt. LLM_UNKNOWN_PROMPT with the nearest name."""
    with _lock:
        found = _prompts.get(name.lower())
        names = {key: each.name for key, each in _prompts.items()}
    if found is None:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0)
        raise LlmError("LLM_UNKNOWN_PROMPT", name=name, suggestion=names[near[0]] if near else "one of none")
    return found
