"""The column of a call: its UDF gives text, which becomes the call's type here, while the query is analysed.

The UDF stays STRING -> STRING whatever the type: rules see one kind of call, and calls that differ in what is made of
their answers only (``llm(...).a``, ``llm(...).b``) are one.
"""

from __future__ import annotations

from collections.abc import Sequence

from spark_llm.answer_form import details_ddl
from spark_llm.call import Detail
from spark_llm.functions.types import AnswerType
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, module


def typed(udf: Expression, answer: AnswerType, details: Sequence[Detail], catalyst: Catalyst) -> Expression:
    """The UDF's text as ``answer``, or where there are details as a STRUCT of both: ``STRUCT<result: T, ...>``."""
    if details:
        return from_json(udf, details_ddl(details, answer.ddl), catalyst)
    if answer.is_nested:
        return from_json(udf, answer.ddl, catalyst)
    if answer.ddl == "STRING":
        return udf
    kind = module(catalyst.jvm.org.apache.spark.sql.types, "DataType").fromDDL(answer.ddl)
    attempt = module(catalyst.expressions, "EvalMode").TRY()  # of an engine that kept to no form: NULL, and no error
    return catalyst.expressions.Cast(udf, kind, catalyst.none, attempt)


def from_json(text: Expression, ddl: str, catalyst: Catalyst) -> Expression:
    """``from_json(text, ddl)``."""
    return catalyst.expressions.JsonToStructs(text, catalyst.literal(ddl), catalyst.map({}))
