"""A grammar over the fake model's four tokens: what may come next is a function of the answer so far."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from spark_llm.engine.constraints.trust import Trust

_LONGEST = 3  # forced tokens in a row


class FakeGrammar:
    """first_token .. first_token + 3 may be allowed; the first of them ends an answer. forced: see CompiledConstraint.

    open_: of 16 states so many allow all tokens.
    """

    kind = "grammar"
    whole = False

    def __init__(self, first_token: int, salt: int, open_: int, forced: tuple[int, ...] = ()) -> None:
        self.first_token = first_token
        self.salt = salt
        self.open = open_
        self.forced = forced
        self.trust = Trust()

    def start(self, output: Sequence[int]) -> Any:
        return FakeMatcher(self, list(output))

    def allowed(self, output: Sequence[int]) -> list[int]:
        digest = hashlib.sha1(repr((self.salt, list(output))).encode()).digest()
        bits = 15 if digest[0] % 16 < self.open else digest[1] % 15 + 1
        return [self.first_token + token for token in range(4) if bits >> token & 1]

    def is_done(self, output: Sequence[int]) -> bool:
        return bool(output) and output[-1] == self.first_token

    def following(self, output: Sequence[int]) -> list[int]:
        """The tokens that must follow."""
        found: list[int] = []
        while not self.is_done([*output, *found]) and len(found) < _LONGEST:
            allowed = self.allowed([*output, *found])
            if len(allowed) > 1:
                break
            found += allowed
        return found


class FakeMatcher:
    """See Matcher; it is its own masker, of which the fake runner asks what is allowed."""

    candidates = text = confidence = state = None

    def __init__(self, grammar: FakeGrammar, output: list[int]) -> None:
        self.grammar = grammar
        self.output = output
        self.error: str | None = None

    @property
    def masker(self) -> FakeMatcher:
        return self

    @property
    def is_whole(self) -> bool:
        return self.is_done

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.grammar.is_done(self.output)

    def allowed(self) -> list[int]:
        return self.grammar.allowed(self.output)

    def offer(self, token: int) -> list[int] | None:
        return self.take(token, 0.0) if token in self.allowed() else None

    def take(self, token: int, log_prob: float) -> list[int]:
        assert token in self.allowed(), "a token is taken that the grammar does not allow"
        self.output.append(token)
        forced = self.grammar.following(self.output)
        self.output += forced
        return forced
