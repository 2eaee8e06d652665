"""Messages that are longer than the context, for calls that say ``truncate => 'longest'``: their longest field is cut.

What is cut is the end of a field's line, as many tokens as are too many; a mark stands in its place. The instruction is
never cut. Fields of which nothing is left stay as their mark, and the next longest one is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARK = "…"
_MARK_TOKENS = 4  # what the mark and another cut of the tokens beside it may add

Offsets = Callable[[str], Sequence[tuple[int, int]]]
"""A text -> where each of its tokens begins and ends, in characters."""


def shortened(segments: Sequence[str], fields: range, excess: int, offsets: Offsets) -> list[str] | None:
    """The segments with about ``excess`` tokens fewer; None if the fields do not have so many.

    fields: which segments are fields. Every segment that ended with a newline still does.
    """
    found = list(segments)
    tokens = {number: offsets(found[number]) for number in fields}
    missing = excess
    for number in sorted(tokens, key=lambda each: -len(tokens[each])):
        if missing <= 0:
            break
        text = found[number]
        body = text.removesuffix("\n")
        kept = len(tokens[number]) - missing - _MARK_TOKENS
        place = tokens[number][kept][0] if kept > 0 else 0
        cut = body[: min(place, len(body))].rstrip() + MARK + text[len(body) :]
        missing -= len(tokens[number]) - len(offsets(cut))
        found[number] = cut
    return found if missing <= 0 else None
