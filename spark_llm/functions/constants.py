"""Constants among the arguments of a function: their values while the query is analysed."""

from __future__ import annotations

from typing import Any

from spark_llm.errors import LlmError
from spark_llm.functions.options import check_option
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, items, module


class Constants:
    """Evaluates constant expressions. LLM_OPTION_NOT_CONSTANT for others, by the name of the option or argument."""

    def __init__(self, catalyst: Catalyst) -> None:
        self._catalyst = catalyst

    def option(self, name: str, value: Expression) -> Any:
        """The checked value of an option; None, its default, for NULL: that is a parameter which is not given."""
        found = self.value(name, value)
        return None if found is None else check_option(name, found)

    def value(self, name: str, value: Expression) -> Any:
        """The Python value; a list for an ARRAY."""
        constant = self._constant(value)
        if constant is None:
            raise LlmError("LLM_OPTION_NOT_CONSTANT", option=name, expression=value.sql())
        jvm = self._catalyst.jvm.org.apache.spark.sql.catalyst
        result = constant.eval(jvm.InternalRow.empty())
        result = module(jvm, "CatalystTypeConverters").convertToScala(result, constant.dataType())
        is_array = constant.dataType().getClass().getSimpleName() == "ArrayType"
        return items(result.toSeq()) if is_array and result is not None else result

    def is_constant(self, value: Expression) -> bool:
        return self._constant(value) is not None

    def members(self, value: Expression) -> dict[str, Expression]:
        """The fields of a STRUCT, by name."""
        names = [str(name) for name in value.dataType().fieldNames()]
        if value.nodeName() == "CreateNamedStruct":  # name, value, name, value ...; struct(1 AS a) has an Alias there
            values = items(value.children())[1::2]
            return {
                name: each.child() if each.nodeName() == "Alias" else each
                for name, each in zip(names, values, strict=True)
            }
        get = self._catalyst.expressions.GetStructField
        return {name: get(value, number, self._catalyst.none) for number, name in enumerate(names)}

    def _constant(self, value: Expression) -> Expression | None:
        constant = value if value.nodeName() == "Literal" else self._evaluable(value)
        return constant if constant.foldable() else None

    def _evaluable(self, value: Expression) -> Expression:
        """``value`` after those rewrites of the optimizer without which some constants have no value (nvl, now)."""
        catalyst = self._catalyst
        rules = catalyst.jvm.org.apache.spark.sql.catalyst.optimizer
        columns = catalyst.seq([catalyst.named(value, "value")])
        plan = catalyst.plans.Project(columns, catalyst.plans.OneRowRelation())
        plan = rules.ComputeCurrentTime.apply(rules.ReplaceExpressions.apply(plan))
        return plan.projectList().apply(0).child()
