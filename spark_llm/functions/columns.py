"""The functions of SQL as functions on columns, with options checked where they are written.

Names of columns are texts, as in pyspark's own functions; a prompt is the text itself, or a Column of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spark_llm.errors import LlmError
from spark_llm.functions.options import check_option, misspelt, option_name, unknown_option
from spark_llm.functions.python_types import plain_options

if TYPE_CHECKING:
    from pyspark.sql import Column


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
    returns: Any = None,
    choices: Sequence[str] | Column | None = None,
    schema: Any = None,
    regex: str | Column | None = None,
    truncate: str | Column | None = None,
    failOnError: bool | Column | None = None,
    confidence: bool | Column | None = None,
    usage: bool | Column | None = None,
    **named: Any,
) -> Column:
    """The answer of a language model about ``fields``: a STRING column, or of the type that the call asks for.

    >>> films.select("title", llm("Is this a comedy?", "title", "plot", returns="BOOLEAN"))

    prompt: the instruction itself, or a Column of instructions (a column's name is not looked up here).
    fields: names of columns (``"*"`` is all) or Columns, which keep their alias; each is a line ``name: value``.
    named: further fields, ``name=column``.
    returns: a type in DDL, a Spark DataType, or a Pydantic model. schema: a JSON Schema as text or dict, or a model.
    choices: the texts that an answer may be, or a Column of arrays. failOnError=False, confidence=True and usage=True
    make the column a STRUCT of ``result`` and what is asked for (docs/ai-functions.md).

    The session must be enabled (``spark_llm.enable``). Raises LlmError for options that are wrong (LLM_INVALID_OPTION,
    LLM_UNKNOWN_OPTION); what only the analyser can know is an AnalysisException with the same conditions.
    """
    options = {
        "model": model,
        "system": system,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
        "order": order,
        "returns": returns,
        "choices": choices,
        "schema": schema,
        "regex": regex,
        "truncate": truncate,
        "failOnError": failOnError,
        "confidence": confidence,
        "usage": usage,
    }
    return _llm("llm", prompt, fields, options, named)


def try_llm(prompt: str | Column, *fields: str | Column, **named: Any) -> Column:
    """As ``llm``, with its options; a row that cannot be answered is NULL, whatever ``spark.llm.onError`` says."""
    return _llm("try_llm", prompt, fields, {}, named)


def ai_filter(question: str | Column, *fields: str | Column, **named: Any) -> Column:
    """Is ``question`` true of the fields? A BOOLEAN column; fields and options as of ``llm``."""
    return _llm("ai_filter", question, fields, {}, named)


def llm_prompt(name: str, *fields: str | Column, **named: Any) -> Column:
    """As ``llm`` with the prompt that ``spark_llm.prompt(name, ...)`` defined; options win over the prompt's own."""
    return _llm("llm_prompt", name, fields, {}, named)


def ai_query(
    endpoint: str,
    request: str | Column,
    returnType: Any = None,
    failOnError: bool | None = None,
    modelParameters: Mapping[str, Any] | Column | None = None,
    responseFormat: str | None = None,
    **options: Any,
) -> Column:
    """The answer of the model ``endpoint`` to ``request``, a column. modelParameters: a dict, or a STRUCT."""
    given = {"returns": returnType, "failOnError": failOnError, **options}
    optional = {"modelParameters": _struct(modelParameters), "responseFormat": responseFormat}
    return _task("ai_query", [_text(endpoint), _column(request)], optional, given)


def ai_complete(
    model: str,
    prompt: str | Column,
    modelParameters: Mapping[str, Any] | Column | None = None,
    responseFormat: str | None = None,
    **options: Any,
) -> Column:
    """The answer of ``model`` to the prompts of a column."""
    optional = {"modelParameters": _struct(modelParameters), "responseFormat": responseFormat}
    return _task("ai_complete", [_text(model), _column(prompt)], optional, options)


def ai_gen(prompt: str | Column, **options: Any) -> Column:
    """The model's answers to the prompts of a column."""
    return _task("ai_gen", [_column(prompt)], {}, options)


def ai_classify(content: str | Column, labels: Sequence[str] | Column, **options: Any) -> Column:
    """The label that fits the text of a column. labels: texts, or a Column with each row's own."""
    return _task("ai_classify", [_column(content), _texts(labels)], {}, options)


def ai_extract(content: str | Column, labels: Sequence[str], **options: Any) -> Column:
    """What the text of a column says about each label: a STRUCT with a STRING for each."""
    return _task("ai_extract", [_column(content), _texts(labels)], {}, options)


def ai_summarize(content: str | Column, max_words: int | None = None, **options: Any) -> Column:
    """A summary of the text of a column, in about 50 words where ``max_words`` does not say; 0 is no limit."""
    return _task("ai_summarize", [_column(content)], {"max_words": max_words}, options)


def ai_translate(content: str | Column, to_lang: str, **options: Any) -> Column:
    """The text of a column in another language, ``"es"`` or ``"Spanish"``."""
    return _task("ai_translate", [_column(content), _text(to_lang)], {}, options)


def ai_fix_grammar(content: str | Column, **options: Any) -> Column:
    """The text of a column with its grammar corrected."""
    return _task("ai_fix_grammar", [_column(content)], {}, options)


def ai_mask(content: str | Column, labels: Sequence[str], **options: Any) -> Column:
    """The text of a column in which what the labels name is [MASKED]."""
    return _task("ai_mask", [_column(content), _texts(labels)], {}, options)


def ai_analyze_sentiment(content: str | Column, **options: Any) -> Column:
    """The sentiment of the text of a column: positive, negative, neutral or mixed."""
    return _task("ai_analyze_sentiment", [_column(content)], {}, options)


def ai_embed(text: str | Column, **options: Any) -> Column:
    """The vector that an encoder makes of the text of a column: ARRAY<FLOAT>. Texts that mean alike point alike."""
    return _task("ai_embed", [_column(text)], {}, options)


def ai_similarity(expr1: str | Column, expr2: str | Column, **options: Any) -> Column:
    """How alike the texts of two columns are: the cosine of their embeddings, a FLOAT of at most 1.

    A text that is the same for all rows is ``F.lit("the text")``, and is embedded once.
    """
    return _task("ai_similarity", [_column(expr1), _column(expr2)], {}, options)


def ai_agg(text: str | Column, instruction: str, **options: Any) -> Column:
    """One answer about all texts of a group: an aggregate function, for ``groupBy(...).agg(...)``."""
    return _task("ai_agg", [_column(text), _text(instruction)], {}, options)


def ai_summarize_agg(text: str | Column, **options: Any) -> Column:
    """A summary of all texts of a group: an aggregate function."""
    return _task("ai_summarize_agg", [_column(text)], {}, options)


def ai_top_k(text: str | Column, criterion: str, k: int, **options: Any) -> Column:
    """The k different texts of a group that meet a criterion best: an aggregate function, of type ARRAY<STRING>."""
    return _task("ai_top_k", [_column(text), _text(criterion)], {"k": k}, options)


def _llm(
    function: str,
    prompt: Any,
    fields: Sequence[str | Column],
    options: Mapping[str, Any],
    named: Mapping[str, Any],
) -> Column:
    """The call of a function with a prompt, fields and options; ``named`` are fields, or options by name."""
    from pyspark.sql import Column
    from pyspark.sql import functions as F

    if not isinstance(prompt, str | Column):
        raise LlmError("LLM_PROMPT_NOT_STRING", expression=repr(prompt), type=type(prompt).__name__)
    given = dict(options)
    arguments = [F.lit(prompt) if isinstance(prompt, str) else prompt, *map(_column, fields)]
    for name, value in named.items():
        option = option_name(name)
        if option is not None:
            given[option] = value
            continue
        if not isinstance(value, Column) and (not isinstance(value, str) or misspelt(name)):
            raise unknown_option(name)
        arguments.append(_named(name, _column(value)))
    return F.call_function(function, *arguments, *_options(given))


def _task(function: str, arguments: list[Column], optional: Mapping[str, Any], options: Mapping[str, Any]) -> Column:
    """The call of a function for one task; ``optional``: further arguments by name, None: not given."""
    from pyspark.sql import Column
    from pyspark.sql import functions as F

    for name in options:
        if option_name(name) is None:
            raise unknown_option(name)
    named = [
        _named(name, value if isinstance(value, Column) else F.lit(value))
        for name, value in optional.items()
        if value is not None
    ]
    return F.call_function(function, *arguments, *named, *_options(options))


def _options(options: Mapping[str, Any]) -> list[Column]:
    """The options that are given, checked, as named arguments."""
    from pyspark.sql import Column
    from pyspark.sql import functions as F

    found = []
    for name, value in plain_options(options).items():
        if value is None:
            continue
        if not isinstance(value, Column):
            checked = check_option(option_name(name) or name, value)
            value = F.array(*map(F.lit, checked)) if isinstance(checked, tuple) else F.lit(checked)
        found.append(_named(name, value))
    return found


def _column(value: str | Column) -> Column:
    from pyspark.sql import functions as F

    return F.col(value) if isinstance(value, str) else value


def _text(value: str) -> Column:
    from pyspark.sql import functions as F

    return F.lit(value)


def _texts(value: Sequence[str] | Column) -> Column:
    from pyspark.sql import Column
    from pyspark.sql import functions as F

    return value if isinstance(value, Column) else F.array(*map(F.lit, value))


def _struct(value: Mapping[str, Any] | Column | None) -> Column | None:
    from pyspark.sql import functions as F

    if not isinstance(value, Mapping):
        return value
    columns = [
        (_texts(each) if isinstance(each, list | tuple) else F.lit(each)).alias(name) for name, each in value.items()
    ]
    return F.struct(*columns)


def _named(name: str, value: Column) -> Column:
    """``name => value``; LLM_NEEDS_DRIVER for a Connect client's columns, which have no JVM."""
    from pyspark import SparkContext
    from pyspark.sql.classic.column import Column as ClassicColumn

    jvm = SparkContext._jvm
    if jvm is None:
        raise LlmError("LLM_NEEDS_DRIVER")
    return ClassicColumn(jvm.PythonSQLUtils.namedArgumentExpression(name, value._jc))
