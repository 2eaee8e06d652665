"""Types of Python as the options ``returns`` and ``schema`` have them: Spark's types, Pydantic's models, dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with ``returns`` and ``schema`` as texts.

    returns: a DDL text, a Spark DataType, or a Pydantic model, which is a schema. schema: a text, a dict or a model.
    """
    plain = dict(options)
    returns, schema = plain.get("returns"), plain.get("schema")
    if _is_model(returns):
        plain["returns"], schema = None, returns
    elif hasattr(returns, "simpleString"):
        plain["returns"] = _ddl(returns)
    if schema is not None:
        plain["schema"] = schema_text(schema)
    return plain


def schema_text(schema: Any) -> Any:
    """A JSON Schema as text; what is none stays as it is, for the check of the option."""
    if _is_model(schema):
        schema = schema.model_json_schema()
    return json.dumps(schema) if isinstance(schema, Mapping) else schema


def _is_model(value: Any) -> bool:
    """Is it a model of Pydantic 2? The library need not be there to tell."""
    return isinstance(value, type) and hasattr(value, "model_json_schema")


def _ddl(data_type: Any) -> str:
    """A DataType as DDL, with the comments and NOT NULLs of its fields, which ``simpleString`` leaves out."""
    if hasattr(data_type, "fields"):
        return f"STRUCT<{', '.join(_field(field) for field in data_type.fields)}>"
    if hasattr(data_type, "elementType"):
        return f"ARRAY<{_ddl(data_type.elementType)}>"
    if hasattr(data_type, "keyType"):
        return f"MAP<{_ddl(data_type.keyType)}, {_ddl(data_type.valueType)}>"
    return str(data_type.simpleString())


def _field(field: Any) -> str:
    name = "`" + field.name.replace("`", "``") + "`"
    comment = field.metadata.get("comment", "")
    escaped = comment.replace("\\", "\\\\").replace("'", "\\'")
    parts = [
        f"{name}: {_ddl(field.dataType)}",
        "" if field.nullable else "NOT NULL",
        f"COMMENT '{escaped}'" * bool(comment),
    ]
    return " ".join(filter(None, parts))
