"""The function builder of ``llm(prompt, field, ..., option => constant)``: argument expressions in, one PythonUDF out.

Catalyst calls it while it analyses a query, after ``*`` is expanded and columns are resolved; so column names reach the
prompt and a wrong call fails before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spark_llm.call import CallSpec, FieldSpec
from spark_llm.config import LlmConf
from spark_llm.errors import LlmError
from spark_llm.functions import fields
from spark_llm.functions.options import OPTIONS, check_option, misspelt, option_name, unknown_option
from spark_llm.optimizer.catalyst.bridge import UDF_NAME, Catalyst, Expression, Jvm, items, module


class LlmBuilder:
    """Builds calls. ``udf_of(session)`` gives the JVM's UserDefinedPythonFunction of the session's application."""

    def __init__(self, catalyst: Catalyst, udf_of: Callable[[Jvm], Jvm]) -> None:
        self._catalyst = catalyst
        self._udf_of = udf_of

    def __call__(self, session: Jvm, arguments: Jvm) -> Expression:
        """The PythonUDF with the arguments (CallSpec as JSON, prompt, field, ...), all STRING.

        Raises LlmError with the conditions of wrong calls (LLM_PROMPT_…, LLM_OPTION_…, …) and of wrong settings of the
        session (LLM_UNKNOWN_CONFIG, LLM_INVALID_CONFIG): this is where a SQL ``SET`` is first seen.
        """
        LlmConf.parse(self._catalyst.settings(session))
        prompt, *rest = items(arguments) or [None]
        options: dict[str, Any] = {}
        columns: list[tuple[FieldSpec, Expression]] = []
        for argument in rest:
            name, value = self._named(argument)
            option = option_name(name) if name is not None else None
            if option in options:
                raise LlmError("LLM_INVALID_OPTION", option=option, value=value.sql(), expected="it only once")
            if option is not None:
                options[option] = self._option(option, value)
            elif name is not None and value.nodeName() == "Literal" and misspelt(name):
                raise unknown_option(name)
            else:
                columns.append(fields.field(value, name, self._catalyst))
        given = {name: value for name, value in options.items() if value is not None}
        spec = CallSpec(fields=tuple(spec for spec, _ in columns), **given)
        return self._udf(session, spec, [self._prompt(prompt), *(column for _, column in columns)])

    def _named(self, argument: Expression) -> tuple[str | None, Expression]:
        if argument.nodeName() == "NamedArgumentExpression":
            return str(argument.key()), argument.value()
        return None, argument

    def _prompt(self, prompt: Expression | None) -> Expression:
        if prompt is None or prompt.nodeName() == "NamedArgumentExpression":
            raise LlmError("LLM_PROMPT_MISSING")
        if prompt.nodeName() == "Alias":
            prompt = prompt.child()
        if fields.is_null(prompt):
            return self._catalyst.literal(None)
        if not fields.is_string(prompt):
            raise LlmError("LLM_PROMPT_NOT_STRING", expression=prompt.sql(), type=prompt.dataType().sql())
        return prompt

    def _option(self, option: str, value: Expression) -> Any:
        """The checked value of an option. NULL is what a parameter has that is not given: the option's default."""
        constant = self._constant(option, value) if option in OPTIONS else None
        return None if constant is None and option in OPTIONS else check_option(option, constant)

    def _constant(self, option: str, value: Expression) -> Any:
        """The Python value of an option; LLM_OPTION_NOT_CONSTANT if the analyser cannot know it."""
        constant = value if value.nodeName() == "Literal" else self._evaluable(value)
        if not constant.foldable():
            raise LlmError("LLM_OPTION_NOT_CONSTANT", option=option, expression=value.sql())
        jvm = self._catalyst.jvm.org.apache.spark.sql.catalyst
        result = constant.eval(jvm.InternalRow.empty())
        result = module(jvm, "CatalystTypeConverters").convertToScala(result, constant.dataType())
        is_array = constant.dataType().getClass().getSimpleName() == "ArrayType"
        return items(result.toSeq()) if is_array and result is not None else result

    def _evaluable(self, value: Expression) -> Expression:
        """``value`` after those rewrites of the optimizer without which some constants have no value (nvl, now)."""
        catalyst = self._catalyst
        rules = catalyst.jvm.org.apache.spark.sql.catalyst.optimizer
        columns = catalyst.seq([catalyst.named(value, "value")])
        plan = catalyst.plans.Project(columns, catalyst.plans.OneRowRelation())
        plan = rules.ComputeCurrentTime.apply(rules.ReplaceExpressions.apply(plan))
        return plan.projectList().apply(0).child()

    def _udf(self, session: Jvm, spec: CallSpec, columns: list[Expression]) -> Expression:
        # Only sampling without a seed may answer equal arguments differently: Spark must not repeat such a call.
        udf = self._udf_of(session)
        return self._catalyst.expressions.PythonUDF(
            UDF_NAME,
            udf.func(),
            udf.dataType(),
            self._catalyst.seq([self._catalyst.literal(spec.encode()), *columns]),
            udf.pythonEvalType(),
            spec.is_repeatable,
            module(self._catalyst.expressions, "NamedExpression").newExprId(),
        )
