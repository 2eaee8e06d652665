"""What one ``llm(...)`` call in a query is: its fields' names and its constant options.

The function builder writes a CallSpec into the plan as the UDF's first argument (a JSON literal); the UDF
reads it in the task. Options left None take the session's configuration in the task.
"""

from __future__ import annotations

import msgspec


class FieldSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One field of a call. ``json`` says that Spark already rendered the value as JSON text (numbers, dates,
    structs ...); otherwise the UDF gets the plain string and quotes it."""

    name: str
    json: bool = False


class CallSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The constant part of a call; ``fields`` are in the order of the UDF's columns after the prompt."""

    fields: tuple[FieldSpec, ...] = ()
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def encode(self) -> str:
        """The JSON text that stands in the plan; equal specs give equal text."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> CallSpec:
        """The inverse of ``encode``; msgspec.ValidationError for other text."""
        return msgspec.json.decode(text, type=CallSpec)
