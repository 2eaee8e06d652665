"""A window's rows of one call and the requests that answer them, several rows one where their arguments are equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Answers = npt.NDArray[np.object_]


@dataclass(slots=True, eq=False)
class Request:
    """One question and the rows that wait for it, a window each. void: as what its rows count if it got no answer.

    again: the text for rows after the first, where it differs: what the answer cost is told once.
    """

    key: bytes | None
    text: str | None = None
    again: str | None = None
    done: bool = False
    void: Literal["", "over_budget", "skipped"] = ""
    waiting: list[CallRows] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class CallRows:
    """A window's rows of one call.

    needed: bool [rows], what the mask says. askable: bool [rows], of these the rows whose arguments ask something.
    request: int64 [rows], numbers into ``requests``, -1 for a row that is not asked. own: the requests that were sent
    for this window, the others were for earlier ones. open: how many of ``requests`` are unanswered.
    """

    columns: list[pa.Array]
    needed: Bools
    askable: Bools
    request: Ints
    requests: list[Request] = field(default_factory=list)
    own: list[Request] = field(default_factory=list)
    open: int = 0

    def answered(self) -> int:
        """About how many rows have their answer, of those that were asked."""
        rows = len(self.request)
        return rows * (len(self.requests) - self.open) // len(self.requests) if self.requests else 0

    def texts(self) -> Answers:
        """object [rows]: the answers, None for NULL and for rows that are not asked or not answered yet."""
        found = np.array([*(request.text for request in self.requests), None], dtype=object)[self.request]
        if any(request.again is not None for request in self.requests):
            later = np.ones(len(found), np.bool_)
            own = {id(request) for request in self.own}
            numbers, first = np.unique(self.request, return_index=True)
            is_own = [number >= 0 and id(self.requests[number]) in own for number in numbers]
            later[first[is_own]] = False
            again = np.array([*(request.again for request in self.requests), None], dtype=object)
            found[later] = again[self.request[later]]
        return found
