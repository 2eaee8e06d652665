"""``llm`` as a function on columns; the same call as in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spark_llm.errors import LlmError
from spark_llm.functions.options import NOT_YET, OPTIONS, check_option, misspelt, unknown_option

if TYPE_CHECKING:
    from pyspark.sql import Column

__all__ = ["llm"]


def llm(
    prompt: str | Column,
    *fields: str | Column,
    model: str | Column | None = None,
    system: str | Column | None = None,
    max_tokens: int | Column | None = None,
    temperature: float | Column | None = None,
    top_p: float | Column | None = None,
    top_k: int | Column | None = None,
    seed: int | Column | None = None,
    stop: str | Sequence[str] | Column | None = None,
    order: str | Column | None = None,
    **named: Any,
) -> Column:
    """The answer of a language model about ``fields``, a STRING column.

    >>> films.select("title", llm("Is this a comedy? Answer yes or no.", "title", "plot", max_tokens=2))

    prompt: the instruction itself, or a Column of instructions (a column's name is not looked up here).
    fields: names of columns (``"*"`` is all) or Columns, which keep their alias; each is a line ``name: value``.
    named: further fields, ``name=column``.

    The session must be enabled (``spark_llm.enable``). Raises LlmError for options that are wrong (LLM_INVALID_OPTION,
    LLM_UNKNOWN_OPTION, LLM_OPTION_NOT_YET); what only the analyser can know is an AnalysisException with the same
    conditions.
    """
    from pyspark.sql import Column
    from pyspark.sql import functions as F

    def column(field: str | Column) -> Column:
        return F.col(field) if isinstance(field, str) else field

    if not isinstance(prompt, str | Column):
        raise LlmError("LLM_PROMPT_NOT_STRING", expression=repr(prompt), type=type(prompt).__name__)
    given = dict(zip(OPTIONS, (model, system, max_tokens, temperature, top_p, top_k, seed, stop, order), strict=True))
    arguments = [F.lit(prompt) if isinstance(prompt, str) else prompt, *map(column, fields)]
    for name, value in named.items():
        if name in NOT_YET:
            check_option(name, value)
        if not isinstance(value, Column) and (not isinstance(value, str) or misspelt(name)):
            raise unknown_option(name)
        arguments.append(_named(name, column(value)))
    for name, value in given.items():
        if isinstance(value, Column):
            arguments.append(_named(name, value))
        elif value is not None:
            checked = check_option(name, value)
            literal = F.array(*map(F.lit, checked)) if isinstance(checked, tuple) else F.lit(checked)
            arguments.append(_named(name, literal))
    return F.call_function("llm", *arguments)


def _named(name: str, value: Column) -> Column:
    """``name => value``; LLM_NEEDS_DRIVER for a Connect client's columns, which have no JVM."""
    from pyspark import SparkContext
    from pyspark.sql.classic.column import Column as ClassicColumn

    jvm = SparkContext._jvm
    if jvm is None:
        raise LlmError("LLM_NEEDS_DRIVER")
    return ClassicColumn(jvm.PythonSQLUtils.namedArgumentExpression(name, value._jc))
