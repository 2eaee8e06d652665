"""``ai_query`` and ``ai_complete``: a model by name, with parameters and a format of the answer as others have them."""

from __future__ import annotations

import json
from typing import Any

from spark_llm.functions import fields
from spark_llm.functions.answer import EXCLUSIVE, Answer, json_text
from spark_llm.functions.schemas import read_schema, schema_of, words
from spark_llm.functions.signature import Bound, Function
from spark_llm.functions.types import parse_type
from spark_llm.optimizer.catalyst.bridge import Expression

_PARAMETERS = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed")


def _query(bound: Bound) -> Expression:
    answer = _answer(bound)
    if "returnType" in bound.given:
        bound.options["returns"] = bound.builder.constants.option("returns", bound.given["returnType"])
    if "failOnError" in bound.given:
        bound.options["failOnError"] = bound.builder.constants.option("failOnError", bound.given["failOnError"])
    return _asked(bound, bound.constant("endpoint"), bound.given["request"], answer)


def _complete(bound: Bound) -> Expression:
    return _asked(bound, bound.constant("model"), bound.given["prompt"], _answer(bound))


def _asked(bound: Bound, model: Any, request: Expression, answer: Answer | None) -> Expression:
    """The call; a request that is no STRING is shown as fields, those of a STRUCT by their names."""
    if not isinstance(model, str) or not model:
        raise bound.wrong(f"{bound.function.required[0]} must be the name of a model, as spark.llm.model has it")
    builder = bound.builder
    options = {"model": model} | _parameters(bound) | bound.options
    if fields.is_string(request) or fields.is_null(request):
        return builder.call(bound.session, request, (), options, answer=answer)
    members = builder.constants.members(request) if fields.is_struct(request) else {"request": request}
    columns = [fields.field(value, name, builder.catalyst) for name, value in members.items()]
    return builder.call(bound.session, builder.text("Answer this request."), columns, options, answer=answer)


def _parameters(bound: Bound) -> dict[str, Any]:
    """``modelParameters => named_struct('max_tokens', 100, 'temperature', 0.7)`` as options."""
    if "modelParameters" not in bound.given:
        return {}
    struct = bound.given["modelParameters"]
    if not fields.is_struct(struct):
        raise bound.wrong("modelParameters must be a STRUCT, as of named_struct('max_tokens', 100)")
    found = {}
    for name, value in bound.builder.constants.members(struct).items():
        if name not in _PARAMETERS:
            raise bound.wrong(f"modelParameters has the field {name}; known are {', '.join(_PARAMETERS)}")
        found[name] = bound.builder.constants.option(name, value)
    return {name: value for name, value in found.items() if value is not None}


def _answer(bound: Bound) -> Answer | None:
    """What ``responseFormat`` says: the text of a JSON value. None: nothing."""
    text = bound.constant("responseFormat")
    if text is None:
        return None
    if not isinstance(text, str):
        raise bound.wrong("responseFormat must be a STRING")
    if "returnType" in bound.given or any(name in bound.options for name in EXCLUSIVE):
        raise bound.wrong("responseFormat says what the answer is already")
    if not text.lstrip().startswith("{"):
        answer = parse_type(text)
        if [field.type.name for field in answer.fields] == ["STRUCT"]:
            answer = answer.fields[0].type  # the name above the answer is the format's own
        return json_text(schema_of(answer), f"Answer in JSON: {words(answer)}")
    try:
        form = json.loads(text)
    except ValueError as error:
        raise bound.wrong(f"responseFormat is no JSON ({error})") from None
    kind = form.get("type")
    if kind == "text":
        return Answer()
    if kind == "json_object":
        return json_text({"type": "object"}, "Answer with a JSON object.")
    wrapping = form.get("json_schema") if kind == "json_schema" else None
    schema = wrapping.get("schema") if isinstance(wrapping, dict) else None
    if not isinstance(schema, dict):
        raise bound.wrong("responseFormat must be text, json_object, json_schema with a schema, or STRUCT<...>")
    answer, held = read_schema(json.dumps(schema))
    return json_text(held, f"Answer in JSON: {words(answer)}")


_MODEL = "a constant STRING: the model, as spark.llm.model has it."
_FORMAT = (
    'responseFormat - a constant STRING: {"type": "json_object"}, {"type": "json_schema", "json_schema": {...}} or '
    "STRUCT<...>; the answer is the text of such a JSON value."
)
_MODEL_PARAMETERS = f"modelParameters - a constant STRUCT with any of {', '.join(_PARAMETERS)}."

FUNCTIONS = (
    Function(
        name="ai_query",
        required=("endpoint", "request"),
        optional=("returnType", "failOnError", "modelParameters", "responseFormat"),
        returns="STRING, or returnType; with failOnError => false STRUCT<result, errorMessage>",
        usage="Returns the answer of a model to a request.",
        about=(
            f"endpoint - {_MODEL}",
            "request - a STRING, the prompt; a STRUCT is shown to the model field by field.",
            "returnType - a constant STRING: the type of the answer, as of llm's returns.",
            "failOnError - a constant BOOLEAN; false tells errors beside the answer.",
            _MODEL_PARAMETERS,
            _FORMAT,
        ),
        examples=(
            "SELECT _FUNC_('default', 'Describe Spark in one sentence.');",
            "SELECT _FUNC_('default', 'Is this spam? ' || body, 'BOOLEAN', failOnError => false) FROM mail;",
        ),
        build=_query,
    ),
    Function(
        name="ai_complete",
        required=("model", "prompt"),
        optional=("modelParameters", "responseFormat"),
        returns="STRING",
        usage="Returns the answer of a model to a prompt.",
        about=(f"model - {_MODEL}", "prompt - a STRING.", _MODEL_PARAMETERS, _FORMAT),
        examples=("SELECT _FUNC_('default', 'A haiku about ' || topic, named_struct('max_tokens', 40)) FROM topics;",),
        build=_complete,
    ),
)
