"""The text of an explanation, at most WIDTH columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spark_llm.optimizer.cost import EMBEDDED_TOKENS_PER_SECOND, CallCost, Number

if TYPE_CHECKING:
    from spark_llm.explaining import CallExplanation, Explanation, RuleNote
    from spark_llm.report import Report

WIDTH = 110
_LEGEND = "<= is at most, ~ is about. Estimates leave out what the result cache answers."
_HINT = (
    "What is not known here, ANALYZE TABLE ... COMPUTE STATISTICS FOR ALL COLUMNS tells, or a run of the query, or "
    'spark_llm.explain(df, mode="analyze").'
)
_NOTHING = "The query calls no llm()."


def layout(found: Explanation) -> str:
    """The explanation as ``explain`` prints it."""
    if not found.calls:
        return _NOTHING
    speed = found.speed
    count = f"{len(found.calls)} calls" if len(found.calls) > 1 else "1 call"
    engines = f"{speed.engines} engines at" if speed.engines > 1 else "an engine of"
    how = "measured" if speed.is_measured else "a guess, none was measured"
    lines = [f"{count} of llm(), by {engines} {speed.tokens_per_second:,.0f} tokens a second ({how})"]
    if any(call.embeds for call in found.calls):
        lines.append(f"embeddings by encoders of {EMBEDDED_TOKENS_PER_SECOND:,.0f} tokens a second each (a guess)")
    for number, call in enumerate(found.calls, 1):
        lines += ["", *_call(number, call, found.report is not None)]
    if len(found.calls) > 1:
        lines += ["", "all calls", *_table(found.total, found.report, found.report is not None)]
    if found.notes or found.off:
        lines += ["", "the query", *_notes(found.notes)]
        if found.off:
            lines += _wrapped("switched off: ", ", ".join(found.off))
    lines += ["", _LEGEND]
    if found.mode == "plan" and not all(call.estimate.seconds.is_known for call in found.calls):
        lines += textwrap.wrap(_HINT, WIDTH)
    return "\n".join(lines)


def _call(number: int, call: CallExplanation, has_run: bool) -> list[str]:
    return [
        f"{number}. {call.prompt!r}",
        *_wrapped("", call.placement),
        *_wrapped("", f"estimated from {call.source}"),
        *_table(call.estimate, call.actual, has_run),
        *_notes(call.notes),
        *(_wrapped("nothing to do: ", ", ".join(call.idle)) if call.idle else []),
    ]


def _table(estimate: CallCost, actual: Report | None, has_run: bool) -> list[str]:
    rows = [
        ("rows", str(estimate.rows), _count(actual, "rows")),
        ("asked", str(estimate.asked), _asked(actual)),
        ("distinct", str(estimate.distinct), ""),
        ("calls", str(estimate.calls), _count(actual, "calls")),
        ("prompt tokens", str(estimate.prompt_tokens), _count(actual, "prompt_tokens")),
        ("prefix hits", _share(estimate), "" if actual is None else f"{actual.prefix_hit_rate:.1%}"),
        ("output tokens", str(estimate.output_tokens), _count(actual, "output_tokens")),
        ("computed tokens", str(estimate.computed_tokens), _computed(actual)),
        ("seconds", _seconds(estimate.seconds), "" if actual is None else f"{actual.seconds:,.1f}"),
    ]
    known = [row for row in rows if row[1] != "?" or row[2]]
    unknown = [row[0] for row in rows if row not in known]
    lines = [f"   {'':<16}{'estimated':>14}" + (f"{'actual':>14}" if has_run else "")] if known else []
    lines += [f"   {name:<16}{one:>14}" + (f"{other:>14}" if has_run else "") for name, one, other in known]
    if unknown:
        lines += _wrapped("not known: ", ", ".join(unknown))
    if has_run and actual is None:
        lines.append("   what really happened stands at the other call with this prompt, or no row came")
    if actual is not None and (rest := _rest(actual)):
        lines += _wrapped("of the rows ", rest)
    return [line.rstrip() for line in lines]


def _count(actual: Report | None, name: str) -> str:
    return "" if actual is None else f"{getattr(actual, name):,}"


def _asked(actual: Report | None) -> str:
    return "" if actual is None else f"{actual.rows - actual.skipped - actual.nulls:,}"


def _computed(actual: Report | None) -> str:
    return "" if actual is None else f"{actual.computed_tokens + actual.output_tokens:,}"


def _rest(actual: Report) -> str:
    """Where answers came from, other than calls."""
    parts = [
        (actual.duplicates, "took the answer of an equal row"),
        (actual.stored, "were in the result cache"),
        (actual.shared, "were in the prompt of another row"),
        (actual.asked_again, "had no clear answer there and were asked alone"),
        (actual.skipped, "were not needed"),
        (actual.nulls, "were NULL without a call"),
        (actual.failed, "failed"),
        (actual.over_budget, "were beyond the budget"),
    ]
    return ", ".join(f"{number:,} {words}" for number, words in parts if number)


def _share(estimate: CallCost) -> str:
    return "?" if estimate.hit_rate is None else f"~ {estimate.hit_rate:.1%}"


def _seconds(number: Number) -> str:
    if number.value is None:
        return "?"
    sign = "<= " if number.kind == "at most" else "~ "
    return sign + (f"{number.value:,.0f}" if number.value >= 100 else f"{number.value:,.1f}")


def _notes(notes: Sequence[RuleNote]) -> list[str]:
    return [line for note in notes for line in _wrapped(f"{'+' if note.fired else '-'} {note.rule}: ", note.why)]


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, WIDTH, initial_indent="   ", subsequent_indent="     ", break_long_words=False)
