"""``ai_embed`` and ``ai_similarity``: the vectors that an encoder makes of texts, and how alike two texts are by them.

A text that is a constant is embedded once for a query, in a scalar subquery, and does not go through Python with the
rows. If it cannot be embedded, the query fails, whatever spark.llm.onError says of rows: the vector is part of the
question, and without it every row would be NULL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spark_llm.call import AnswerForm
from spark_llm.functions import fields
from spark_llm.functions.answer import Answer
from spark_llm.functions.signature import Bound, Function
from spark_llm.functions.types import AnswerType
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, module

if TYPE_CHECKING:
    from pyspark.sql import Column

_VECTOR = Answer(AnswerType("ARRAY", element=AnswerType("FLOAT")), AnswerForm(kind="embedding", is_json=True))


def _embed(bound: Bound) -> Expression:
    return _embedding(bound, "text")


def _similarity(bound: Bound) -> Expression:
    if bound.options.get("failOnError") is False:
        raise bound.wrong(
            "its answer is of two calls: failOnError can only be true. Leave it out for NULL in rows that fail "
            "(with spark.llm.onError = null), or compare vectors that tell their errors: "
            "vector_cosine_similarity(ai_embed(expr1, failOnError => false).result, ai_embed(expr2))"
        )
    catalyst = bound.builder.catalyst
    one, other = (_embedding(bound, name, in_subquery=_has_cosine()) for name in ("expr1", "expr2"))
    if "Literal" in (one.nodeName(), other.nodeName()):  # NULL, and nothing need be asked about the other
        return catalyst.expressions.Literal.create(None, catalyst.types.FloatType)
    return _cosine(one, other, catalyst)


def _embedding(bound: Bound, name: str, in_subquery: bool = True) -> Expression:
    """The column of the call about an argument. in_subquery: a constant's may stand in a subquery."""
    builder, text = bound.builder, bound.given[name]
    if not fields.is_string(text) and not fields.is_null(text):
        raise bound.wrong(f"{name} must be a STRING, but {text.sql()} is {text.dataType().sql()}")
    if not builder.constants.is_constant(text):
        return builder.call(bound.session, text, (), bound.options, answer=_VECTOR)
    value = bound.constant(name)
    options = {"failOnError": True, **bound.options}
    column = builder.call(bound.session, builder.text(value), (), options, answer=_VECTOR)
    if value is None:
        return builder.catalyst.expressions.Literal.create(None, column.dataType())
    return _once(column, builder.catalyst) if in_subquery else column


def _once(column: Expression, catalyst: Catalyst) -> Expression:
    """The value of a column that depends on no row, as a scalar subquery.

    Of Range, which Spark leaves as it is: a subquery over OneRowRelation it would put back where it stands.
    """
    row = module(catalyst.plans, "Range").apply(0, 1, 1, 1)
    plan = catalyst.plans.Project(catalyst.seq([catalyst.named(column, "embedding")]), row)
    subquery = module(catalyst.expressions, "ScalarSubquery")
    names = {method.getName() for method in subquery.getClass().getMethods()}
    defaults = [f"apply$default${number}" for number in range(2, len(names))]  # Spark versions differ in how many
    return catalyst.expressions.ScalarSubquery(plan, *(getattr(subquery, name)() for name in defaults if name in names))


def _cosine(one: Expression, other: Expression, catalyst: Catalyst) -> Expression:
    """The cosine of two ARRAY<FLOAT>, a FLOAT: NULL where one of them is NULL, or has no length other than 0."""
    from pyspark.sql import functions as F
    from pyspark.sql.classic.column import Column as ClassicColumn

    classic = catalyst.jvm.org.apache.spark.sql.classic
    a, b = (ClassicColumn(classic.ExpressionUtils.column(each)) for each in (one, other))
    found = F.vector_cosine_similarity(a, b) if _has_cosine() else cosine_of_arrays(a, b)
    return module(classic, "ColumnNodeToExpressionConverter").apply(found._jc.node())


def _has_cosine() -> bool:
    from pyspark.sql import functions as F

    return hasattr(F, "vector_cosine_similarity")


def cosine_of_arrays(one: Column, other: Column) -> Column:
    """``vector_cosine_similarity`` for Spark before 4.2, which has none: one pass over both arrays.

    It is made of higher-order functions, in which Spark allows no subqueries: there a constant's vector goes through
    Python with the rows, asked once all the same, as equal texts are.
    """
    from pyspark.sql import functions as F

    zero = F.lit(0.0)
    products = F.zip_with(
        one.cast("array<double>"),
        other.cast("array<double>"),
        lambda x, y: F.struct((x * y).alias("xy"), (x * x).alias("xx"), (y * y).alias("yy")),
    )
    return F.aggregate(
        products,
        F.struct(zero.alias("xy"), zero.alias("xx"), zero.alias("yy")),
        lambda sums, each: F.struct(*((sums[name] + each[name]).alias(name) for name in ("xy", "xx", "yy"))),
        lambda sums: F.try_divide(sums["xy"], F.sqrt(sums["xx"]) * F.sqrt(sums["yy"])).cast("float"),
    )


FUNCTIONS = (
    Function(
        name="ai_embed",
        required=("text",),
        optional=(),
        returns="ARRAY<FLOAT>",
        usage="Returns the vector that an encoder makes of a text; texts that mean alike point alike.",
        about=("text - a STRING; NULL gives NULL.",),
        examples=("SELECT id, _FUNC_(review) FROM reviews;",),
        build=_embed,
        is_typed=True,
        takes=("model", "truncate", "failOnError", "usage"),
    ),
    Function(
        name="ai_similarity",
        required=("expr1", "expr2"),
        optional=(),
        returns="FLOAT",
        usage="Returns how alike two texts are: the cosine of their embeddings, at most 1.",
        about=("expr1 - a STRING; NULL gives NULL.", "expr2 - a STRING; one that is constant is embedded once."),
        examples=("SELECT review FROM reviews ORDER BY _FUNC_(review, 'it arrived broken') DESC LIMIT 5;",),
        build=_similarity,
        is_typed=True,
        takes=("model", "truncate", "failOnError"),
    ),
)
