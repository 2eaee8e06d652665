"""Answers that keep to a grammar (JSON schema, regular expression, Lark), by llguidance (github.com/guidance-ai).

llguidance walks the tokens' trie through an Earley parser with a lazily built lexer: a mask costs microseconds and
nothing is precomputed. Bytes that the grammar forces become tokens as the tokenizer would make them (a token that what
follows may still lengthen is left to the model), and these need no step of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from spark_llm.engine.constraints.trust import Trust
from spark_llm.errors import LlmError

_LIMITS = LLParserLimits(verbose_errors=False)

# Forced tokens that are kept: many rows begin their answers alike, and to find what must follow takes llguidance longer
# than all other tokens of an answer together.
_MOST_KEPT = 1024
_MOST_BEFORE = 64  # tokens of an answer up to there; longer ones are hardly alike
_MOST_SHARED = 16  # tokens of answers whose masks are looked for among those of the step


class Grammar:
    """A grammar of llguidance's own form, compiled. kind: what the user wrote, for messages.

    LLM_INVALID_CONSTRAINT: it is malformed, or no text keeps to it.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, kind: str) -> None:
        self.kind = kind
        self.trust = Trust()
        self._first = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if self._first.is_error():
            raise LlmError("LLM_INVALID_CONSTRAINT", kind=kind, reason=one_line(self._first.get_error()))
        self._followers: dict[bytes, list[int]] = {}  # an answer's tokens, int32 -> what must follow
        begun = self._first.deep_copy()
        self.forced = tuple(begun.compute_ff_tokens())
        begun.consume_tokens(list(self.forced))
        self.whole = begun.is_stopped()
        if self.whole and not begun.is_accepting():
            raise LlmError("LLM_INVALID_CONSTRAINT", kind=kind, reason="no text keeps to it")

    def start(self, output: Sequence[int]) -> GrammarMatcher:
        matcher = self._first.deep_copy()  # shares the lexer's states: what one row has built serves all
        if output:
            matcher.consume_tokens(list(output))
        return GrammarMatcher(matcher, array("i", output), self._followers)


class GrammarMatcher:
    """llguidance's matcher of one row, which has taken ``output``. See Matcher."""

    __slots__ = ("_followers", "_output", "masker")
    candidates = None
    text = None
    confidence = None

    def __init__(self, masker: LLMatcher, output: array[int], followers: dict[bytes, list[int]]) -> None:
        self.masker = masker
        self._output = output
        self._followers = followers

    @property
    def state(self) -> tuple[int, bytes] | None:
        output = self._output
        return (id(self._followers), output.tobytes()) if len(output) <= _MOST_SHARED else None

    @property
    def is_whole(self) -> bool:
        return self.masker.is_accepting()

    @property
    def is_done(self) -> bool:
        """Also where the matcher has failed: nothing may follow then."""
        return self.masker.is_stopped()

    @property
    def error(self) -> str | None:
        return one_line(self.masker.get_error()) if self.masker.is_error() else None

    def take(self, token: int, log_prob: float) -> list[int]:
        self.masker.consume_token(token)
        return self._follow(token)

    def offer(self, token: int) -> list[int] | None:
        masker = self.masker
        if masker.try_consume_tokens([token]):
            return self._follow(token)
        return [] if masker.is_error() else None

    def _follow(self, token: int) -> list[int]:
        """Takes the tokens after ``token`` that the grammar leaves no choice about."""
        masker, output = self.masker, self._output
        output.append(token)
        if not masker.compute_ff_bytes():
            return []
        key = output.tobytes() if len(output) <= _MOST_BEFORE else None
        forced = self._followers.get(key) if key is not None else None
        if forced is None:
            forced = masker.compute_ff_tokens()
            if key is not None:
                if len(self._followers) >= _MOST_KEPT:
                    self._followers.clear()
                self._followers[key] = forced
        if forced:
            masker.consume_tokens(forced)
            output.extend(forced)
        return forced


def one_line(message: str) -> str:
    """The part of llguidance's messages that a user can use: they show the place in lines of their own."""
    return " ".join(message.split())
