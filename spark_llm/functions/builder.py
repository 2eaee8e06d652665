"""The function builder of ``llm(prompt, field, ..., option => constant)``: argument expressions in, a column out.

Catalyst calls it while it analyses a query, after ``*`` is expanded and columns are resolved; so column names reach the
prompt, the column has its type, and a wrong call fails before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from spark_llm.aggregate import AGGREGATE_NAME, AggregateSpec
from spark_llm.call import CallSpec, Detail, FieldSpec
from spark_llm.config import LlmConf
from spark_llm.config_backend import BUILTIN
from spark_llm.errors import LlmError
from spark_llm.functions import fields
from spark_llm.functions.answer import Answer, answer_of
from spark_llm.functions.constants import Constants
from spark_llm.functions.constraints import check
from spark_llm.functions.options import misspelt, option_name, unknown_option
from spark_llm.functions.results import typed
from spark_llm.optimizer.catalyst.bridge import UDF_NAME, Catalyst, Expression, Jvm, module

Column = tuple[FieldSpec, Expression]

_OF_ANSWERS = {
    "returns",
    "choices",
    "schema",
    "regex",
    "failOnError",
    "confidence",
    "usage",
}  # CallSpec has none of them


class LlmBuilder:
    """Builds calls. ``udf_of(session, is_vector)`` gives the JVM's UserDefinedPythonFunction of the session's
    application, for texts or for vectors."""

    def __init__(self, catalyst: Catalyst, udf_of: Callable[[Jvm, bool], Jvm]) -> None:
        self.catalyst = catalyst
        self.constants = Constants(catalyst)
        self._udf_of = udf_of

    def llm(
        self,
        session: Jvm,
        arguments: Sequence[Expression],
        *,
        options: Mapping[str, Any] | None = None,
        is_null_on_error: bool = False,
    ) -> Expression:
        """The column of ``llm(arguments)``. options: what the arguments' own win over.

        Raises LlmError with the conditions of wrong calls (LLM_PROMPT_…, LLM_OPTION_…, LLM_INVALID_…) and of wrong
        settings of the session (LLM_UNKNOWN_CONFIG, LLM_INVALID_CONFIG): this is where a SQL ``SET`` is first seen.
        """
        if not arguments or arguments[0].nodeName() == "NamedArgumentExpression":
            raise LlmError("LLM_PROMPT_MISSING")
        columns, given = self.arguments(arguments[1:])
        given = {**(options or {}), **given}
        return self.call(session, arguments[0], columns, given, is_null_on_error=is_null_on_error)

    def arguments(self, arguments: Sequence[Expression]) -> tuple[list[Column], dict[str, Any]]:
        """The fields and the checked options that stand behind the prompt.

        ``choices`` that are no constant are an Expression: each row's own.
        """
        options: dict[str, Any] = {}
        columns: list[Column] = []
        for argument in arguments:
            name, value = named(argument)
            option = option_name(name) if name is not None else None
            if option in options:
                raise LlmError("LLM_INVALID_OPTION", option=option, value=value.sql(), expected="it only once")
            if option is not None:
                options[option] = self.option(option, value)
            elif name is not None and value.nodeName() == "Literal" and misspelt(name):
                raise unknown_option(name)
            else:
                columns.append(fields.field(value, name, self.catalyst))
        return columns, {name: value for name, value in options.items() if value is not None}

    def option(self, option: str, value: Expression) -> Any:
        """The value of an option: checked, None for NULL."""
        if option == "choices" and fields.is_text_array(value) and not self.constants.is_constant(value):
            return value
        return self.constants.option(option, value)

    def call(
        self,
        session: Jvm,
        prompt: Expression,
        columns: Sequence[Column] = (),
        options: Mapping[str, Any] | None = None,
        *,
        answer: Answer | None = None,
        is_null_on_error: bool = False,
    ) -> Expression:
        """The column of a call: a PythonUDF with the arguments (CallSpec as JSON, prompt, field, ...), all STRING, with
        what makes the call's type of its text; the UDF of a vector without details has the type itself. answer: what
        the call answers, None: what the options say."""
        conf = LlmConf.parse(self.catalyst.settings(session))
        given = dict(options or {})
        columns = list(columns)
        own_choices = None
        if not isinstance(given.get("choices", ()), tuple):
            own_choices = len(columns)
            columns.append(fields.field(given.pop("choices"), "choices", self.catalyst))
        answer = answer or answer_of(given, own_choices)
        if answer.form is not None and conf.backend == BUILTIN:  # other servers have their own idea of what they can
            check(answer.form)
        given.setdefault("max_tokens", answer.max_tokens(conf.max_output_length))
        spec = CallSpec(
            fields=tuple(spec for spec, _ in columns),
            answer=answer.form,
            details=_details(given),
            on_error="null" if is_null_on_error else _on_error(given),
            **{name: value for name, value in given.items() if name not in _OF_ANSWERS},
        )
        udf = self._udf(session, spec, [self._prompt(prompt, answer.hint), *(column for _, column in columns)])
        return udf if _is_vector(spec) else typed(udf, answer.type, spec.details, self.catalyst)

    def text(self, text: str | None) -> Expression:
        """A STRING literal."""
        return self.catalyst.literal(text)

    def _prompt(self, prompt: Expression, hint: str) -> Expression:
        """The prompt with what it says about the form of the answer."""
        if prompt.nodeName() == "Alias":
            prompt = prompt.child()
        if fields.is_null(prompt):
            return self.text(None)
        if not fields.is_string(prompt):
            raise LlmError("LLM_PROMPT_NOT_STRING", expression=prompt.sql(), type=prompt.dataType().sql())
        if not hint:
            return prompt
        if prompt.nodeName() == "Literal" and prompt.value() is not None:
            return self.text(f"{prompt.value()}\n{hint}")
        return self.catalyst.expressions.Concat(self.catalyst.seq([prompt, self.text(f"\n{hint}")]))

    def aggregate_input(self, session: Jvm, spec: AggregateSpec, text: Expression) -> Expression:
        """What an aggregate over answers has for its input: a PythonUDF (AggregateSpec as JSON, text) -> STRING."""
        return self._python(session, AGGREGATE_NAME, [self.catalyst.literal(spec.encode()), text], True)

    def _udf(self, session: Jvm, spec: CallSpec, columns: list[Expression]) -> Expression:
        # Only sampling without a seed may answer equal arguments differently: Spark must not repeat such a call.
        arguments = [self.catalyst.literal(spec.encode()), *columns]
        return self._python(session, UDF_NAME, arguments, spec.is_repeatable, _is_vector(spec))

    def _python(
        self, session: Jvm, name: str, columns: list[Expression], is_repeatable: bool, is_vector: bool = False
    ) -> Expression:
        udf = self._udf_of(session, is_vector)
        return self.catalyst.expressions.PythonUDF(
            name,
            udf.func(),
            udf.dataType(),
            self.catalyst.seq(columns),
            udf.pythonEvalType(),
            is_repeatable,
            module(self.catalyst.expressions, "NamedExpression").newExprId(),
        )


def _is_vector(spec: CallSpec) -> bool:
    return spec.task == "embed" and not spec.details


def named(argument: Expression) -> tuple[str | None, Expression]:
    """The name of an argument, if it has one, and its value."""
    if argument.nodeName() == "NamedArgumentExpression":
        return str(argument.key()), argument.value()
    return None, argument


def _details(options: Mapping[str, Any]) -> tuple[Detail, ...]:
    asked: dict[Detail, bool] = {
        "error": options.get("failOnError") is False,
        "confidence": options.get("confidence", False),
        "usage": options.get("usage", False),
    }
    return tuple(detail for detail, is_asked in asked.items() if is_asked)


def _on_error(options: Mapping[str, Any]) -> Literal["fail", "null"] | None:
    """What becomes of a row that cannot be answered; None: what the session says."""
    fails = options.get("failOnError")
    return None if fails is None else "fail" if fails else "null"
