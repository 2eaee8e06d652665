"""The options ``returns``, ``schema``, ``regex``, ``choices`` -> the answer for Spark, the engine and the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from spark_llm.call import AnswerForm
from spark_llm.errors import LlmError
from spark_llm.functions import patterns
from spark_llm.functions.schemas import Schema, read_schema, schema_of, words
from spark_llm.functions.types import AnswerType, parse_type

EXCLUSIVE = ("returns", "schema", "regex", "choices")
"""The options that say what the answer is, of which a call has one."""

STRING = AnswerType("STRING")
_INTEGERS = ("TINYINT", "SMALLINT", "INT", "BIGINT")
_VALUE_TOKENS = 48  # of a value in JSON with its name, about
_NUMBER_BYTES = {
    "FLOAT": 33,
    "DOUBLE": 33,
    "DATE": 10,
    "TIMESTAMP": 19,
    "TIMESTAMP_NTZ": 19,
    **dict.fromkeys(_INTEGERS, 20),
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call answers.

    type: Spark's. form: what the engine is held to, None: free text. hint: what the prompt says about it. length: the
    most tokens that an answer has, None: not known. least: how many an answer may well need.
    """

    type: AnswerType = STRING
    form: AnswerForm | None = None
    hint: str = ""
    length: int | None = None
    least: int = 0

    def max_tokens(self, default: int) -> int | None:
        """The call's ``max_tokens`` where it does not say; None: ``default`` is right."""
        if self.length is not None:
            return self.length
        return max(default, self.least) if self.least else None


def answer_of(options: Mapping[str, Any], choices_field: int | None = None) -> Answer:
    """What the options say. choices_field: the number of the field with each row's choices, in place of ``choices``.

    Raises LLM_INVALID_RETURN_TYPE, LLM_INVALID_SCHEMA, LLM_CONFLICTING_OPTIONS.
    """
    given = [
        name for name in EXCLUSIVE if options.get(name) is not None or (name == "choices" and choices_field is not None)
    ]
    returns = parse_type(options["returns"]) if "returns" in given else None
    if returns is not None and given == ["returns", "choices"]:
        if returns == AnswerType("ARRAY", element=STRING) and choices_field is None:
            return _typed(AnswerType("ARRAY", element=AnswerType("ENUM", choices=tuple(options["choices"]))))
        if returns.name in ("STRING", "VARCHAR"):
            given.remove("returns")
    if len(given) > 1:
        raise LlmError("LLM_CONFLICTING_OPTIONS", one=given[0], other=given[1])
    if choices_field is not None:
        form = AnswerForm(kind="choices", field=choices_field)
        return Answer(form=form, hint="Answer with one of the choices.")
    if "choices" in given:
        return chosen(options["choices"])
    if returns is not None:
        return _typed(returns)
    if "schema" in given:
        answer, schema = read_schema(options["schema"])
        bare = answer.name == "ENUM" or answer.name in ("DATE", "TIMESTAMP")  # no quotes where nothing is around them
        return _typed(answer) if bare else _of_schema(answer, schema)
    if "regex" in given:
        return Answer(form=AnswerForm(kind="regex", text=options["regex"]))
    return Answer()


def json_text(schema: Schema, hint: str) -> Answer:
    """An answer that is the text of a JSON value: a STRING for Spark."""
    form = AnswerForm(kind="json_schema", text=_dumped(schema))
    return Answer(form=form, hint=hint, least=16 + 4 * _VALUE_TOKENS)


def chosen(choices: Sequence[str]) -> Answer:
    """One of the texts."""
    shown = ", ".join(choice if _is_plain(choice) else json.dumps(choice, ensure_ascii=False) for choice in choices)
    return Answer(
        form=AnswerForm(kind="choices", choices=tuple(choices)),
        hint=f"Answer with one of: {shown}.",
        length=1 + max(len(choice.encode()) for choice in choices),
    )


def _is_plain(choice: str) -> bool:
    return choice.isprintable() and "," not in choice and choice == choice.strip()


def _typed(answer: AnswerType) -> Answer:
    """The answer of a type that the user names."""
    name = answer.name
    if answer.is_nested:
        return _of_schema(answer, schema_of(answer))
    if name == "ENUM":
        return chosen(answer.choices)
    if name == "STRING":
        return Answer()
    if name == "BOOLEAN":
        form = AnswerForm(kind="choices", choices=("true", "false"), is_json=True)
        return Answer(answer, form, "Answer true or false.", length=6)
    if name == "VARCHAR":
        form = _matching(patterns.text(answer.length))
        return Answer(STRING, form, f"Answer in at most {answer.length} characters.")
    if name in _INTEGERS:
        form = AnswerForm(kind="json_schema", text=_dumped(schema_of(answer)), is_json=True)
        return Answer(answer, form, "Answer with an integer.", length=1 + _NUMBER_BYTES[name])
    if name == "DATE":
        form = _matching(patterns.DATE)
        return Answer(answer, form, "Answer with a date: YYYY-MM-DD.", length=1 + _NUMBER_BYTES[name])
    if name.startswith("TIMESTAMP"):
        form = _matching(patterns.TIMESTAMP)
        return Answer(
            answer, form, "Answer with a date and a time: YYYY-MM-DDThh:mm:ss.", length=1 + _NUMBER_BYTES[name]
        )
    decimal = name == "DECIMAL"
    form = _matching(patterns.decimal(*answer.digits) if decimal else patterns.REAL, is_json=True)
    length = 1 + (answer.digits[0] + 3 if decimal else _NUMBER_BYTES[name])
    return Answer(answer, form, "Answer with a number.", length=length)


def _matching(pattern: str, is_json: bool = False) -> AnswerForm:
    """A match of one of our own patterns."""
    return AnswerForm(kind="regex", text=pattern, is_json=is_json, portable=True)


def _of_schema(answer: AnswerType, schema: Schema) -> Answer:
    form = AnswerForm(kind="json_schema", text=_dumped(schema), is_json=True)
    hint = f"Answer in JSON: {words(answer)}" if answer != STRING else f"Answer in JSON of this schema: {form.text}"
    return Answer(answer, form, hint, least=16 + _VALUE_TOKENS * answer.leaves())


def _dumped(schema: Schema) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
