"""What a column is called whose query gives it no name: the call as it was written, as of Spark's own functions."""

from __future__ import annotations

from collections.abc import Sequence

from spark_llm.functions.builder import named
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression

_AGGREGATE = "org.apache.spark.sql.catalyst.expressions.aggregate.AggregateFunction"


def shown_as_call(name: str, arguments: Sequence[Expression], result: Expression, catalyst: Catalyst) -> Expression:
    """``result`` under the name ``name(arguments)``: not its type's cast, nor what stands for the call in the plan.

    Decode is Spark's expression that is nothing else: it has arguments to show and an expression to stand for, which
    the analyser looks into, and which the optimizer puts in its place before any other rule. An aggregate function
    must be one itself: ours shows its arguments as a text.
    """
    shown = [_shown(argument, catalyst) for argument in arguments]
    if catalyst.is_a(result, _AGGREGATE):
        return catalyst.questions("LlmAggregates").shown(result, ", ".join(map(catalyst.pretty_sql, shown)))
    call = catalyst.expressions.Decode(catalyst.seq(shown), result)
    call.setTagValue(catalyst.jvm.org.apache.spark.sql.catalyst.analysis.FunctionRegistry.FUNC_ALIAS(), name)
    return call


def _shown(argument: Expression, catalyst: Catalyst) -> Expression:
    """The argument; one with a name as the text ``name => value``, which Spark has no words for."""
    name, value = named(argument)
    if name is None:
        return argument
    return catalyst.expressions.PrettyAttribute(f"{name} => {catalyst.pretty_sql(value)}", value.dataType())
