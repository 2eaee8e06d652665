"""What calls cost and what moving rows costs: the one cost model, in rows, tokens, bytes and seconds.

Pure arithmetic: it knows neither Spark nor the engine. Each number says where it comes from, and is unknown rather than
made up: a rule that decides by cost does the safe thing where a number is unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

Source = Literal["job", "catalog", "measured", "plan", "guess", "unknown"]
"""Rows that were counted or sampled by a job; the catalog's statistics; the engine's measured speed; Spark's own
estimate from the plan; a constant of this module or of a rule; nothing."""
Kind = Literal["exact", "at most", "about"]

_SOURCES: tuple[Source, ...] = ("job", "catalog", "measured", "plan", "guess", "unknown")
_KINDS: tuple[Kind, ...] = ("exact", "about", "at most")

TEMPLATE_HEAD, TEMPLATE_TAIL = 24.0, 6.0
"""Tokens of a chat template before and behind the message: a guess (planning does not run templates)."""
ENCODER_ENDS = 2.0
"""Tokens that an encoder puts around a text."""
SHARED_TAIL, SHARED_ROW = 26.0, 3.0
"""Tokens of the request for a line a row, and of a row's number, where rows share a prompt: of an English tokenizer."""
TOKENS_PER_SECOND = 1000.0
"""Of one engine before any was measured: a guess."""
EMBEDDED_TOKENS_PER_SECOND = 5000.0
"""Of one engine that makes vectors: a guess, nobody measures it for plans."""
EXCHANGE_BYTES_PER_SECOND = 50e6
"""That one task writes to and reads from a shuffle, or hands to a Python worker and back: a guess, on the low side."""
EXCHANGE_SECONDS = 0.1
"""Of a shuffle or of one more Python function for starting it: a guess."""
ROW_BYTES = 100.0
"""Of a row whose size is not known: a guess."""


class Number(NamedTuple):
    """``value``, None where nothing is known, with the weakest thing that it comes from and how it is meant."""

    value: float | None = None
    source: Source = "unknown"
    kind: Kind = "about"

    @property
    def is_known(self) -> bool:
        return self.value is not None

    @property
    def is_counted(self) -> bool:
        """Does it come from rows that somebody counted, and is it no mere bound?"""
        return self.value is not None and self.source in ("job", "catalog") and self.kind != "at most"

    def times(self, other: Number | float) -> Number:
        return _joined(self, other, lambda a, b: a * b)

    def plus(self, other: Number | float) -> Number:
        return _joined(self, other, lambda a, b: a + b)

    def minus(self, other: Number | float) -> Number:
        """At least 0. A bound of what is taken away is no bound of what is left."""
        found = _joined(self, other, lambda a, b: max(0.0, a - b))
        is_bound = isinstance(other, Number) and other.kind == "at most"
        return found._replace(kind="about") if is_bound else found

    def at_most(self) -> Number:
        """The same as an upper bound."""
        return self if self.value is None else self._replace(kind="at most")

    def __str__(self) -> str:
        """``4,866``, ``<= 4,866``, ``~ 4,866``, or ``?``."""
        if self.value is None:
            return "?"
        sign = {"exact": "", "at most": "<= ", "about": "~ "}[self.kind]
        return sign + (
            f"{self.value:,.0f}" if self.value >= 100 or self.value == int(self.value) else f"{self.value:.2g}"
        )


UNKNOWN = Number()
NONE = Number(0.0, "job", "exact")


def exact(value: float, source: Source) -> Number:
    return Number(float(value), source, "exact")


def about(value: float, source: Source) -> Number:
    return Number(float(value), source, "about")


def at_most(value: float, source: Source) -> Number:
    return Number(float(value), source, "at most")


def smaller(one: Number, other: Number) -> Number:
    """The smaller one; what is known bounds what is not, and a bound stays one."""
    if one.value is None or other.value is None:
        known = one if other.value is None else other
        return known.at_most()
    found = one if one.value <= other.value else other
    return found._replace(kind=max(one.kind, other.kind, key=_KINDS.index))


def total(numbers: list[Number]) -> Number:
    """Their sum, unknown where one is; an exact 0 where there is none."""
    found = NONE
    for number in numbers:
        found = found.plus(number)
    return found


def _joined(one: Number, other: Number | float, join: Callable[[float, float], float]) -> Number:
    if not isinstance(other, Number):
        other = exact(other, "job")
    if one.value is None or other.value is None:
        return UNKNOWN
    return Number(
        join(one.value, other.value),
        max(one.source, other.source, key=_SOURCES.index),
        max(one.kind, other.kind, key=_KINDS.index),
    )


@dataclasses.dataclass(frozen=True)
class Speed:
    """tokens_per_second: of prompts and answers, that one engine computes. is_measured: with this model and machine."""

    tokens_per_second: float = TOKENS_PER_SECOND
    is_measured: bool = False
    engines: int = 1

    def seconds(self, tokens: Number) -> Number:
        """How long all engines together need for ``tokens`` that they compute."""
        rate = exact(1 / (self.tokens_per_second * self.engines), "measured" if self.is_measured else "guess")
        return tokens.times(rate._replace(kind="about"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallInput:
    """What is known of the rows that reach a call.

    rows: how many. asked: of them that may need an answer (a mask, a filter's other condition or a limit drops the
    others), None: all. distinct: different argument tuples among the rows. field_tokens: mean tokens of a row's fields,
    rendered. shared: share of them that a prefix cache finds when every row is asked, 0 to 1, equal rows included.
    head, tail: tokens of the constant beginning and end of all prompts. varying_tokens, varying_shared: the same two
    numbers as for the fields for a prompt that differs by row. max_output: most tokens of an answer.
    folds: equal rows are asked once. rows_per_prompt: how many rows at most share a prompt; prompts: how many there are
    when every row is asked, UNKNOWN: as few as can be; left_tokens: of field_tokens those that a prompt has once.
    """

    rows: Number = UNKNOWN
    asked: Number | None = None
    distinct: Number = UNKNOWN
    field_tokens: Number = UNKNOWN
    shared: Number = UNKNOWN
    head: float = TEMPLATE_HEAD
    tail: float = TEMPLATE_TAIL
    varying_tokens: Number = NONE
    varying_shared: Number = NONE
    max_output: int = 0
    folds: bool = True
    rows_per_prompt: int = 1
    prompts: Number = UNKNOWN
    left_tokens: Number = UNKNOWN


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallCost:
    """What a call is expected to cost. Rows and calls are numbers of rows, the rest are tokens and seconds.

    calls: rows that the engine computes. prompt_tokens: of these. hits: of them that the prefix cache finds.
    output_tokens: of their answers, an upper bound. computed_tokens: what goes through the model, prompts less hits and
    answers. seconds: of all engines together.
    """

    rows: Number = UNKNOWN
    asked: Number = UNKNOWN
    distinct: Number = UNKNOWN
    calls: Number = UNKNOWN
    prompt_tokens: Number = UNKNOWN
    hits: Number = UNKNOWN
    output_tokens: Number = UNKNOWN
    computed_tokens: Number = UNKNOWN
    seconds: Number = UNKNOWN

    @property
    def hit_rate(self) -> float | None:
        """The share of prompt tokens found in the prefix cache, 0 to 1."""
        if self.hits.value is None or not self.prompt_tokens.value:
            return None
        return self.hits.value / self.prompt_tokens.value


def call_cost(known: CallInput, speed: Speed) -> CallCost:
    """The cost of one call.

    calls = min(asked, distinct); prompt tokens = calls x (head + fields + tail); of the fields the prefix cache leaves
    rows x fields x (1 - shared) to compute, folded or not, of the head one a engine, of the tail all. Where k rows
    share a prompt, calls = that / k, each with the left fields once and k lines of right ones, and answers of k lines.
    """
    asked = known.rows if known.asked is None else smaller(known.asked, known.rows)
    calls = asked
    if known.folds:
        calls = smaller(asked, known.distinct) if known.distinct.is_known else asked.at_most()
    if calls.value == 0:
        nothing = calls._replace(kind="exact")
        spent = dict.fromkeys(("prompt_tokens", "hits", "output_tokens", "computed_tokens", "seconds"), nothing)
        return CallCost(rows=known.rows, asked=asked, distinct=known.distinct, calls=calls, **spent)
    per_row = known.field_tokens.plus(known.varying_tokens).plus(known.head + known.tail)
    prompt = calls.times(per_row)
    tail = known.tail
    if known.rows_per_prompt > 1:
        pairs, calls = calls, _prompts(calls, known)
        tail += SHARED_TAIL
        right = known.field_tokens.minus(known.left_tokens).plus(SHARED_ROW)
        left = known.left_tokens.plus(known.varying_tokens).plus(known.head + tail)
        prompt = pairs.times(right).plus(calls.times(left))
    # Rows that are not asked compute nothing: at most what all rows would.
    fields = known.rows.times(known.field_tokens).times(exact(1, "job").minus(known.shared))
    varying = known.rows.times(known.varying_tokens).times(exact(1, "job").minus(known.varying_shared))
    heads = min(float(speed.engines), calls.value or 0.0) * known.head
    missed = fields.plus(varying).plus(calls.times(tail)).plus(heads)
    missed = _capped(missed, prompt)
    output = calls.times(float(known.max_output)).at_most() if known.max_output else NONE
    computed = missed.plus(output)
    return CallCost(
        rows=known.rows,
        asked=asked,
        distinct=known.distinct,
        calls=calls,
        prompt_tokens=prompt,
        hits=prompt.minus(missed),
        output_tokens=output,
        computed_tokens=computed,
        seconds=speed.seconds(computed),
    )


def _prompts(pairs: Number, known: CallInput) -> Number:
    """How many prompts show so many rows."""
    fewest = pairs.times(1 / known.rows_per_prompt)
    if known.prompts.value is None or pairs.value is None:
        return fewest._replace(kind=max(fewest.kind, "about", key=_KINDS.index))
    found = smaller(known.prompts, pairs)
    return found._replace(kind=max(found.kind, pairs.kind, key=_KINDS.index))


def _capped(number: Number, limit: Number) -> Number:
    if number.value is None or limit.value is None:
        return number
    return number._replace(value=min(number.value, limit.value))


def sum_of_costs(costs: list[CallCost]) -> CallCost:
    """The costs of several calls together; a number is unknown where it is for one of them."""
    names = [field.name for field in dataclasses.fields(CallCost)]
    return CallCost(**{name: total([getattr(cost, name) for cost in costs]) for name in names})


def ask_seconds(calls: float, tokens: float, speed: Speed) -> float:
    """Seconds of ``calls`` calls that compute ``tokens`` tokens each: prompt less what the cache finds, and answer."""
    return calls * tokens / (speed.tokens_per_second * speed.engines)


def move_seconds(rows: float, row_bytes: float | None, slots: int) -> float:
    """Seconds to take ``rows`` rows through an exchange, or through a Python worker and back, in ``slots`` tasks.

    row_bytes: of a row, None: not known (``ROW_BYTES`` then).
    """
    size = ROW_BYTES if row_bytes is None else row_bytes
    return EXCHANGE_SECONDS + rows * size / (EXCHANGE_BYTES_PER_SECOND * max(1, slots))
