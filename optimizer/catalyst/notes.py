"""What the rules did about each call of a query and why not more, for whoever asks (``spark_llm.explain``)."""

from __future__ import annotations

from typing import NamedTuple


class Note(NamedTuple):
    """rule: its name. call: the label of the call, or of the node, that it is about. fired: it changed the plan."""

    rule: str
    call: str
    fired: bool
    why: str


MOST_NOTES = 1000  # the oldest go


class Notes:
    """Notes of what was optimized; each is kept once, as rules run until nothing changes any more."""

    def __init__(self) -> None:
        self._notes: dict[Note, None] = {}

    def fired(self, rule: str, call: str, why: str) -> None:
        """The rule changed the plan for this call."""
        self._keep(Note(rule, call, True, why))

    def declined(self, rule: str, call: str, why: str) -> None:
        """The rule looked at this call and left it alone. Not for calls that it is not about."""
        self._keep(Note(rule, call, False, why))

    def all(self) -> list[Note]:
        """All notes in the order in which they were first made."""
        return list(self._notes)

    def _keep(self, note: Note) -> None:
        self._notes[note] = None
        while len(self._notes) > MOST_NOTES:
            self._notes.pop(next(iter(self._notes)), None)
