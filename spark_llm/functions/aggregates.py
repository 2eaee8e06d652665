"""``ai_agg``, ``ai_summarize_agg`` and ``ai_top_k``: aggregate functions whose calls a plan rule makes.

What they build is an aggregate function (catalyst/llm_aggregates.java) over a Python function, neither of which is ever
run; so Spark itself checks where it may stand and handles DISTINCT, FILTER and HAVING. rules/llm_aggregates.py takes it
out.
"""

from __future__ import annotations

from typing import Any

from spark_llm.aggregate import AggregateSpec
from spark_llm.config import LlmConf
from spark_llm.functions import fields
from spark_llm.functions.signature import Bound, Function
from spark_llm.optimizer.catalyst.bridge import Expression, Jvm

BYTES_PER_TOKEN = 3  # of text; fewer only in scripts and texts that the tokenizer hardly knows, whose chunks are cut
ANSWER_TOKENS = 128  # of an answer about a chunk, and of the last one
_QUOTES_TOKENS = 4  # around an answer where it is one of several
_MOST = 10_000
_SUMMARY = "Summarize what these texts say."


def _agg(bound: Bound) -> Expression:
    instruction = bound.constant("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise bound.wrong("instruction must be a constant STRING that is not empty")
    return _reduced(bound, instruction.strip())


def _summarize_agg(bound: Bound) -> Expression:
    return _reduced(bound, _SUMMARY)


def _reduced(bound: Bound, instruction: str) -> Expression:
    options = _options(bound)
    options.setdefault("max_tokens", ANSWER_TOKENS)
    options.setdefault("truncate", "longest")
    length = LlmConf.parse(bound.builder.catalyst.settings(bound.session)).chunk_length
    spec = AggregateSpec(
        function=bound.function.name,  # type: ignore[arg-type]
        prompt=f"{instruction}\nAnswer from all of the texts, in one short answer.",
        combine=f"{instruction}\nThese are answers about parts of the texts. Combine them into one short answer.",
        options=options,
        chunk_bytes=length * BYTES_PER_TOKEN,
        fan_in=max(2, length // (options["max_tokens"] + _QUOTES_TOKENS)),
    )
    return _function(bound, spec, bound.builder.catalyst.types.StringType, True)


def _top_k(bound: Bound) -> Expression:
    criterion, k = bound.constant("criterion"), bound.constant("k")
    if not isinstance(criterion, str) or not criterion.strip():
        raise bound.wrong("criterion must be a constant STRING that is not empty")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= _MOST:
        raise bound.wrong(f"k must be a constant whole number from 1 to {_MOST}")
    options = _options(bound)
    options.setdefault("truncate", "longest")
    prompt = f"How well does the text meet this criterion: {criterion.strip()}\n0 is not at all, 10 is perfectly."
    spec = AggregateSpec(function="ai_top_k", prompt=prompt, options=options, k=k)
    types = bound.builder.catalyst.types
    return _function(bound, spec, types.createArrayType(types.StringType, False), False)


def _options(bound: Bound) -> dict[str, Any]:
    for name in ("confidence", "usage"):
        if bound.options.get(name):
            raise bound.wrong(f"its answer is of several calls: it takes no {name}")
    if bound.options.get("failOnError") is False:
        raise bound.wrong("its answer is of several calls: failOnError can only be true")
    return dict(bound.options)


def _function(bound: Bound, spec: AggregateSpec, type_: Jvm, is_nullable: bool) -> Expression:
    """The aggregate function of a DataType of Spark's."""
    catalyst = bound.builder.catalyst
    _, text = fields.field(bound.given["text"], "text", catalyst)
    marker = bound.builder.aggregate_input(bound.session, spec, text)
    return catalyst.questions("LlmAggregates").function(marker, spec.function, type_, is_nullable)


_TEXT = "text - a STRING; NULL is left out."

FUNCTIONS = (
    Function(
        name="ai_agg",
        required=("text", "instruction"),
        optional=(),
        returns="STRING, NULL for a group without texts",
        usage="Returns one answer about all texts of a group.",
        about=(_TEXT, "instruction - a constant STRING: what is asked about the texts."),
        examples=("SELECT _FUNC_(review, 'What do customers complain about?') FROM reviews;",),
        build=_agg,
        is_typed=True,
    ),
    Function(
        name="ai_summarize_agg",
        required=("text",),
        optional=(),
        returns="STRING, NULL for a group without texts",
        usage="Returns a summary of all texts of a group.",
        about=(_TEXT,),
        examples=("SELECT _FUNC_(review) FROM reviews;",),
        build=_summarize_agg,
        is_typed=True,
    ),
    Function(
        name="ai_top_k",
        required=("text", "criterion", "k"),
        optional=(),
        returns="ARRAY<STRING>, the best first, without texts of a group empty",
        usage="Returns the k different texts of a group that meet a criterion best.",
        about=(
            _TEXT,
            "criterion - a constant STRING.",
            f"k - a constant whole number from 1 to {_MOST}.",
        ),
        examples=("SELECT _FUNC_(review, 'praises the actors', 3) FROM reviews;",),
        build=_top_k,
        is_typed=True,
    ),
)
