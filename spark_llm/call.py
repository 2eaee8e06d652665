"""What one ``llm(...)`` call in a query is: its fields' names, its constant options, and what the rules decided.

The function builder writes a CallSpec into the plan as the UDF's first argument (a JSON literal), the plan rules
write their decisions into it, so that EXPLAIN shows them, and the UDF reads it in the task. Options left None take
the session's configuration in the task.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Order = Literal["auto", "as_written"]
Detail = Literal["error", "confidence", "usage"]
LINE_TOKENS = 6  # of the number, the colon and the end of a line, where an answer has one for each row

Condition = list[Any]  # on the answers of a group's calls, as spark_llm.condition evaluates it


class FieldSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One field of a call. ``json`` says that Spark already rendered the value as JSON text (numbers, dates,
    structs ...); otherwise the UDF gets the plain string and quotes it."""

    name: str
    json: bool = False


class PromptPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a call's prompts are put together, as the prompt rules decided (CONTRACTS.md 1 and 2), and why.

    fields: numbers of the fields in the order in which rows render them that no group takes; empty: as written.
    table: digest of the order table that gives groups of rows an order of their own; None: there is none.
    instruction_last: the fields stand before the instruction. later_calls: how many calls of the query ask later
    about the same rows' fields. fields_why, instruction_why: for EXPLAIN; "" is: not decided. rows: how many pairs of a
    join may share a prompt where they have the same left row, of which are the fields ``left``, by number; 0: none.
    """

    fields: tuple[int, ...] = ()
    table: str | None = None
    fields_why: str = ""
    instruction_last: bool = False
    instruction_why: str = ""
    later_calls: int = 0
    rows: int = 0
    left: tuple[int, ...] = ()

    def most_output(self, each: int) -> int:
        """Most tokens of a prompt's answer where that about one row has at most ``each``."""
        return each if self.rows < 2 else self.rows * (each + LINE_TOKENS)


class RowPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the plan rules did about a call's rows: so that a rule knows its own work, and for EXPLAIN.

    fold: rows with equal arguments are answered once; fold_why: why not. is_sorted: the call's input is sorted by its
    prompts, in partitions of ``partitions`` if that is not 0. order_why: "" is: not decided.
    """

    fold: bool = False
    fold_why: str = ""
    is_sorted: bool = False
    partitions: int = 0
    order_why: str = ""


class Budget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one engine may spend on a query; 0: no limit. The rest of its rows fail, or are NULL where ``partial``.

    calls: that the engine computes. length: tokens of their prompts and answers. seconds: since the query's first row.
    """

    calls: int = 0
    length: int = 0
    seconds: float = 0.0
    partial: bool = False


class AnswerForm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every answer of a call is by construction, so that it parses to the call's type.

    kind: "choices": one of ``choices``, or of the row's own, which are a JSON array in the field with the number
    ``field``; "json_schema": an instance of the JSON Schema ``text``; "regex": a match of ``text``; "embedding": a JSON
    array of numbers, the vector that an encoder makes of the prompt.
    is_json: the answer is JSON as it stands, which scalars may be, too (3.5, true); else it is plain text.
    portable: the regular expression means the same to Python, so that the task can check answers.
    """

    kind: Literal["choices", "json_schema", "regex", "embedding"]
    text: str = ""
    choices: tuple[str, ...] = ()
    field: int | None = None
    is_json: bool = False
    portable: bool = False


class CallSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The constant part of a call; the UDF's columns are the prompt, then ``fields`` in their order, then the mask.

    masked: there is a mask, a BOOLEAN column: rows where it is not true are NULL and not asked.
    order: the call's own option; ``as_written`` keeps prompt rules away from it. prompt, rows, budget: set by rules.
    answer: None is free text. details: what the UDF tells beside the answer; where there are any, its text is a JSON
    object with the answer as ``result`` (spark_llm.answer_form). on_error: wins over spark.llm.onError. truncate: cut
    the longest field of a row whose prompt is too long.
    """

    fields: tuple[FieldSpec, ...] = ()
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    order: Order | None = None
    answer: AnswerForm | None = None
    details: tuple[Detail, ...] = ()
    on_error: Literal["fail", "null"] | None = None
    truncate: Literal["longest"] | None = None
    masked: bool = False
    prompt: PromptPlan | None = None
    rows: RowPlan | None = None
    budget: Budget | None = None

    def encode(self) -> str:
        """The JSON text that stands in the plan; equal specs give equal text."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> CallSpec:
        """The inverse of ``encode``; msgspec.ValidationError for other text."""
        return msgspec.json.decode(text, type=CallSpec)

    @property
    def is_repeatable(self) -> bool:
        """Do equal arguments give equal answers? Not if answers are drawn without a seed (CONTRACTS.md 3)."""
        return not self.temperature or self.seed is not None

    @property
    def task(self) -> Literal["generate", "embed"]:
        """What the engine of the call does; one that embeds has no answers of tokens, and prompts share nothing."""
        return "embed" if self.answer is not None and self.answer.kind == "embedding" else "generate"

    def canonical(self) -> bytes:
        """What, beside a row's own arguments, its answer depends on: parameters, template, schema, order policy."""
        prompt = self.prompt or PromptPlan()
        policy = PromptPlan(fields=prompt.fields, table=prompt.table, instruction_last=prompt.instruction_last)
        return msgspec.json.encode(_asked(self, policy))

    def drawn(self) -> bytes:
        """The same without the order policy: what, beside a row's arguments, the seed of its draws depends on."""
        return msgspec.json.encode(_asked(self, None))


def _asked(spec: CallSpec, prompt: PromptPlan | None) -> CallSpec:
    """The spec without what changes no answer."""
    return msgspec.structs.replace(
        spec, prompt=prompt, rows=None, order=None, masked=False, budget=None, details=(), on_error=None
    )


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Several calls that one UDF answers, row by row: siblings over the same fields, or the conditions of a filter.

    arguments: for each call the numbers of its columns among those behind the spec: prompt, fields, mask if it has one.
    conditions: those that the filter above puts on the answers; empty: none is known. A row for which one of them
    cannot hold any more is dropped there, so that its other calls need not be asked (they are NULL).
    limit: how many rows of those that meet the conditions the query needs in all, 0: all. node: names the group within
    its query, for counting them. pair: number, as in arguments, of the column with the id of the left row, where the
    rows are pairs of a join and a left row needs one pair that meets the conditions; None: they are not.
    """

    calls: tuple[CallSpec, ...]
    arguments: tuple[tuple[int, ...], ...]
    conditions: tuple[Condition, ...] = ()
    limit: int = 0
    node: str = ""
    pair: int | None = None

    def encode(self) -> str:
        """The JSON text that stands in the plan."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(text: str) -> GroupSpec:
        """The inverse of ``encode``; msgspec.ValidationError for other text."""
        return msgspec.json.decode(text, type=GroupSpec)
