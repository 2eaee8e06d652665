"""What scheduling knows of a constraint: which tokens an answer must begin with, and how one row's answer may go on.

Compiled by the text side (compiler.py): labels.py has choices, grammar.py everything that a grammar says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from spark_llm.engine.constraints.trust import Trust

Ints = npt.NDArray[np.int32]
KIND_NAMES = {
    "choices": "choices",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
}  # of Constraint.kind, for messages


class Matcher(Protocol):
    """Where one answer stands. A function of the tokens that it has taken, which are those of the answer.

    candidates: int32, ascending: the only tokens that may come next, where they are few. masker: else llguidance's
    matcher, which makes a mask of those that may. state: equal only where masks are; None: not known to be.
    is_whole: the answer may end here. is_done: it must. error: why the constraint could not be followed.
    text, confidence: of a choice that is whole, see Completion.
    """

    @property
    def candidates(self) -> Ints | None: ...

    @property
    def masker(self) -> LLMatcher | None: ...

    @property
    def state(self) -> tuple[int, bytes] | None: ...

    @property
    def is_whole(self) -> bool: ...

    @property
    def is_done(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    @property
    def text(self) -> str | None: ...

    @property
    def confidence(self) -> float | None: ...

    def take(self, token: int, log_prob: float) -> list[int]:
        """The answer goes on with ``token``; returns those that must follow, which are taken, too.

        log_prob: of the token among the candidates; NaN where there are none.
        """

    def offer(self, token: int) -> list[int] | None:
        """``take`` for a token that was sampled from all of the vocabulary; None: it is refused, nothing changes."""


class CompiledConstraint(Protocol):
    """A constraint of one tokenizer; rows share it.

    kind: its name in messages. forced: tokens that every answer begins with. whole: they are the whole answer, which
    needs no model. trust: whether rows may be sampled without masks; None: never.
    """

    @property
    def kind(self) -> str: ...

    @property
    def forced(self) -> tuple[int, ...]: ...

    @property
    def whole(self) -> bool: ...

    @property
    def trust(self) -> Trust | None: ...

    def start(self, output: Sequence[int]) -> Matcher:
        """A matcher that has taken ``output``, which begins with ``forced``."""
