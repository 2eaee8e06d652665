"""The fields of a call: what a field is called, and the JVM expression that renders its value."""

from __future__ import annotations

from spark_llm.call import FieldSpec
from spark_llm.errors import LlmError
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Jvm, module

_STRINGS = {"StringType", "CharType", "VarcharType"}
_CAST = {"BooleanType", "ByteType", "ShortType", "IntegerType", "LongType", "DecimalType"}
_NESTED = {"StructType", "ArrayType", "MapType", "VariantType"}


def is_string(expression: Expression) -> bool:
    return _kind(expression) in _STRINGS


def is_struct(expression: Expression) -> bool:
    return _kind(expression) == "StructType"


def is_text_array(expression: Expression) -> bool:
    """Is it an ARRAY<STRING>?"""
    return _kind(expression) == "ArrayType" and _kind_of(expression.dataType().elementType()) in _STRINGS


def is_null(expression: Expression) -> bool:
    """Is it the untyped NULL?"""
    return _kind(expression) == "NullType"


def field(expression: Expression, name: str | None, catalyst: Catalyst) -> tuple[FieldSpec, Expression]:
    """A field's spec and its STRING expression. ``name`` is what the query calls it, None: its column's name.

    STRING stays as it is (the UDF quotes it). Everything else becomes JSON text as Spark's to_json writes it: numbers,
    true and false, dates and timestamps as quoted ISO text, structs with their NULL fields. NULL stays NULL.

    Raises LLM_UNSUPPORTED_FIELD_TYPE.
    """
    name = field_name(expression, catalyst) if name is None else name
    if expression.nodeName() == "Alias":
        expression = expression.child()
    if is_string(expression):
        return FieldSpec(name), expression
    text = _json(expression, catalyst)
    if text is None or not text.checkInputDataTypes().isSuccess():
        raise LlmError("LLM_UNSUPPORTED_FIELD_TYPE", field=name, type=expression.dataType().sql())
    return FieldSpec(name, json=True), text


def field_name(expression: Expression, catalyst: Catalyst) -> str:
    """The name that a SELECT list would give the column: ``a``, the ``b`` of ``a.b``, the text of other expressions."""
    kind = expression.nodeName()
    if kind in ("Cast", "TempResolvedColumn"):  # the latter: a column in HAVING that is not grouped
        return field_name(expression.child(), catalyst)
    if kind == "GetStructField":
        return str(expression.extractFieldName())
    if kind == "GetArrayStructFields":
        return str(expression.field().name())
    if catalyst.is_a(expression, "org.apache.spark.sql.catalyst.expressions.NamedExpression"):
        return str(expression.name())
    return catalyst.pretty_sql(expression)


def _json(expression: Expression, catalyst: Catalyst) -> Expression | None:
    """JSON text of the value; None for a type without one."""
    kind = _kind(expression)
    if kind == "NullType":
        return catalyst.literal(None)
    if kind == "BinaryType":
        return None
    if kind in _CAST:
        # ANSI writes decimals plainly (0.00), the other mode may write 0E-2.
        ansi = module(catalyst.expressions, "EvalMode").ANSI()
        return catalyst.expressions.Cast(expression, catalyst.types.StringType, catalyst.none, ansi)
    if kind in _NESTED:
        return _to_json(expression, catalyst)
    # to_json takes no bare value. A scalar's JSON neither begins nor ends with a bracket: trimming an array's is exact.
    array = catalyst.expressions.CreateArray(catalyst.seq([expression]))
    text = catalyst.expressions.StringTrim(_to_json(array, catalyst), catalyst.some(catalyst.literal("[]")))
    is_null = catalyst.expressions.IsNull(expression)
    return catalyst.expressions.If(is_null, catalyst.literal(None), text)


def _to_json(expression: Expression, catalyst: Catalyst) -> Expression:
    options = catalyst.map({"ignoreNullFields": "false"})
    return catalyst.expressions.StructsToJson(options, expression, catalyst.none)


def _kind(expression: Expression) -> str:
    return _kind_of(expression.dataType())


def _kind_of(data_type: Jvm) -> str:
    return str(data_type.getClass().getSimpleName()).removesuffix("$")
