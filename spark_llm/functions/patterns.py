"""Regular expressions each of whose matches a Spark type can hold: bare answers, and texts within JSON.

They use what all engines have: groups, classes, counts. The calendar is that of Spark, proleptic Gregorian; years have
four digits, from 1000 on.
"""

from __future__ import annotations

_LEAP = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
DATE = f"(?:[1-9][0-9]{{3}}-{_DAY}|{_LEAP}-02-29)"
"""``2024-02-29``: days that exist."""

TIMESTAMP = f"{DATE}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
"""``2024-02-29T12:30:00``: in the session's time zone where the type has one."""

REAL = r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?"
"""A number of up to 15 digits on each side of the point: what a DOUBLE holds, and answers that end."""


def decimal(precision: int, scale: int) -> str:
    """Numbers that DECIMAL(precision, scale) holds exactly."""
    whole = precision - scale
    front = f"(?:0|[1-9][0-9]{{0,{whole - 1}}})" if whole else "0"
    return f"-?{front}" + (rf"(?:\.[0-9]{{1,{scale}}})?" if scale else "")


def text(length: int) -> str:
    """One to ``length`` characters of any kind."""
    return rf"(?s:.{{1,{length}}})"
