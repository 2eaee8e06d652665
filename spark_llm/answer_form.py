"""A typed call's answers in the task: a row's own choices, the check of what came back, what is told beside it."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from spark_llm.call import AnswerForm, Detail
from spark_llm.vectors import numbers

USAGE_COLUMNS = ("prompt_tokens", "cached_tokens", "output_tokens")
"""Where the engine's answers tell a row's Usage."""

_SHOWN = 80  # characters of an answer in an error


class Usage(NamedTuple):
    """Tokens that a row cost: of its prompt, of these those found in the prefix cache, and of its answer."""

    prompt: int = 0
    cached: int = 0
    output: int = 0


@functools.lru_cache(maxsize=4096)
def row_choices(text: str | None) -> tuple[str, ...]:
    """The choices in a row's JSON array, each once; none for NULL. Elements that are NULL or empty are no choices."""
    found = json.loads(text) if text is not None else []
    return tuple(dict.fromkeys(choice for choice in found if isinstance(choice, str) and choice))


def why_not(form: AnswerForm, text: str, choices: Sequence[str] = ()) -> str | None:
    """Why ``text`` is no answer of this form, or None. An engine that keeps to the form gives no such text; others may.

    choices: the row's own, where the form says that rows have them.
    """
    if form.kind == "choices":
        return None if text in (form.choices or choices) else f"{text[:_SHOWN]!r} is none of the choices"
    if form.kind == "embedding":
        try:
            numbers(text)
        except msgspec.MsgspecError as error:
            return f"{text[:_SHOWN]!r} is no array of numbers ({error})"
    elif form.is_json:
        try:
            finite_json(text)
        except ValueError as error:
            return f"{text[:_SHOWN]!r} is no JSON ({error})"
    if form.kind == "regex" and form.portable and re.fullmatch(form.text, text) is None:
        return f"{text[:_SHOWN]!r} does not match {form.text[:_SHOWN]!r}"
    return None


def finite_json(text: str) -> Any:
    """The JSON value. ValueError also for what Python takes for JSON, or reads as infinite: NaN, Infinity, 1e999."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_SHOWN]} is no number that a DOUBLE holds")
    return number


def detailed(
    details: Sequence[Detail],
    form: AnswerForm | None,
    text: str | None,
    error: str | None = None,
    confidence: float | None = None,
    usage: Usage | None = None,
) -> str:
    """The JSON object that the UDF gives for a call with ``details``; from_json makes a STRUCT of it."""
    is_json = text is not None and form is not None and form.is_json
    parts = [f'"result":{text if is_json else json.dumps(text, ensure_ascii=False)}']
    if "error" in details:
        parts.append(f'"errorMessage":{json.dumps(error, ensure_ascii=False)}')
    if "confidence" in details:
        parts.append(f'"confidence":{json.dumps(confidence)}')
    if "usage" in details:
        tokens = usage or Usage()
        parts.append(
            f'"usage":{{"prompt_tokens":{tokens.prompt},"cached_tokens":{tokens.cached},"output_tokens":{tokens.output}}}'
        )
    return "{" + ",".join(parts) + "}"


def details_ddl(details: Sequence[Detail], result: str) -> str:
    """The STRUCT of what ``detailed`` writes, in Spark's DDL. result: the type of the answer."""
    fields = [f"result: {result}"]
    if "error" in details:
        fields.append("errorMessage: STRING")
    if "confidence" in details:
        fields.append("confidence: DOUBLE")
    if "usage" in details:
        fields.append("usage: STRUCT<prompt_tokens: BIGINT, cached_tokens: BIGINT, output_tokens: BIGINT>")
    return f"STRUCT<{', '.join(fields)}>"
