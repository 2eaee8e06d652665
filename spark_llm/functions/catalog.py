"""All functions of SQL that this package brings: what Spark's DESCRIBE FUNCTION says, and what builds a call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from spark_llm.errors import LlmError
from spark_llm.functions import aggregates, ai, embeddings
from spark_llm.functions.answer import EXCLUSIVE
from spark_llm.functions.builder import LlmBuilder, named
from spark_llm.functions.options import OPTIONS
from spark_llm.functions.prompts import prompt_named
from spark_llm.functions.signature import Function
from spark_llm.optimizer.catalyst.bridge import Expression, Jvm

Build = Callable[[LlmBuilder, Jvm, Sequence[Expression]], Expression]

_FIELD = "field - any columns, `*`, or `name => expression`; each reaches the model as a line `name: value`."
_ALL_NULL = "NULL in all fields gives NULL."
_OPTION = f"option - {', '.join(OPTIONS)}."


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function. usage, arguments, examples: of DESCRIBE FUNCTION EXTENDED."""

    name: str
    usage: str
    arguments: str
    examples: str
    build: Build


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The functions: llm, its relatives, and those for one task each."""
    return (*_LLM, *(_entry(function) for function in (*ai.FUNCTIONS, *embeddings.FUNCTIONS, *aggregates.FUNCTIONS)))


def _entry(function: Function) -> Entry:
    def build(builder: LlmBuilder, session: Jvm, arguments: Sequence[Expression]) -> Expression:
        return function.build(function.bind(builder, session, arguments))

    signature = function.signature.replace(function.name, "_FUNC_", 1)
    return Entry(
        name=function.name,
        usage=f"{signature} - {function.usage} Result: {function.returns}.",
        arguments=_listed("Arguments", "* ", (*function.about, f"option - by name: {', '.join(function.options)}.")),
        examples=_listed("Examples", "> ", function.examples),
        build=build,
    )


def _listed(title: str, mark: str, lines: Sequence[str]) -> str:
    """A section as Spark's own functions have it."""
    return "\n".join(["", f"    {title}:", *(f"      {mark}{line}" for line in lines), "  "])


def _llm(builder: LlmBuilder, session: Jvm, arguments: Sequence[Expression]) -> Expression:
    return builder.llm(session, arguments)


def _try_llm(builder: LlmBuilder, session: Jvm, arguments: Sequence[Expression]) -> Expression:
    return builder.llm(session, arguments, is_null_on_error=True)


def _filter(builder: LlmBuilder, session: Jvm, arguments: Sequence[Expression]) -> Expression:
    for argument in arguments:
        option = (named(argument)[0] or "").lower()
        if option in EXCLUSIVE:
            signature = "ai_filter(question, field, ...[, option => constant ...])"
            reason = f"its answer is a BOOLEAN: it takes no {option}"
            raise LlmError("LLM_INVALID_CALL", function="ai_filter", reason=reason, signature=signature)
    return builder.llm(session, arguments, options={"returns": "BOOLEAN"})


def _prompt(builder: LlmBuilder, session: Jvm, arguments: Sequence[Expression]) -> Expression:
    if not arguments or arguments[0].nodeName() == "NamedArgumentExpression":
        raise LlmError("LLM_PROMPT_MISSING")
    name = builder.constants.value("name", arguments[0])
    found = prompt_named(name if isinstance(name, str) else repr(name))
    return builder.llm(session, [builder.text(found.text), *arguments[1:]], options=found.options)


_LLM = (
    Entry(
        name="llm",
        usage="_FUNC_(prompt, field, ..., option => constant) - Returns the model's answer about the fields.",
        arguments=_listed(
            "Arguments",
            "* ",
            ("prompt - a STRING, the instruction. NULL gives NULL.", f"{_FIELD} {_ALL_NULL}", _OPTION),
        ),
        examples=_listed(
            "Examples",
            "> ",
            (
                "SELECT id, _FUNC_('Is this review positive?', review, returns => 'BOOLEAN') FROM reviews;",
                "SELECT _FUNC_('Say in five words what this film is about.', * EXCEPT (id)) FROM films;",
            ),
        ),
        build=_llm,
    ),
    Entry(
        name="try_llm",
        usage="_FUNC_(prompt, field, ..., option => constant) - As llm; a row that cannot be answered is NULL.",
        arguments=_listed("Arguments", "* ", ("prompt - a STRING, the instruction.", f"{_FIELD} {_ALL_NULL}", _OPTION)),
        examples=_listed(
            "Examples", "> ", ("SELECT _FUNC_('In which year was this?', plot, returns => 'INT') FROM films;",)
        ),
        build=_try_llm,
    ),
    Entry(
        name="ai_filter",
        usage="_FUNC_(question, field, ..., option => constant) - Returns whether a question about the fields is true.",
        arguments=_listed("Arguments", "* ", ("question - a STRING.", f"{_FIELD} {_ALL_NULL}", _OPTION)),
        examples=_listed(
            "Examples", "> ", ("SELECT * FROM reviews WHERE _FUNC_('Does it praise the actors?', review);",)
        ),
        build=_filter,
    ),
    Entry(
        name="llm_prompt",
        usage="_FUNC_(name, field, ..., option => constant) - As llm with a named prompt (spark_llm.prompt).",
        arguments=_listed("Arguments", "* ", ("name - a constant STRING.", f"{_FIELD} {_ALL_NULL}", _OPTION)),
        examples=_listed("Examples", "> ", ("SELECT _FUNC_('sentiment', review) FROM reviews;",)),
        build=_prompt,
    ),
)
