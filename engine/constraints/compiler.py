"""Constraints of requests, compiled for one tokenizer; rows of a call, and calls that repeat, share the result."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.constraints.matcher import KIND_NAMES, CompiledConstraint
from spark_llm.engine.request import Constraint
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Compiled constraints that are kept, those used last: calls with choices of their own in each row have many, and what
# clients send may be long.
_MOST_KEPT = 1024
_MOST_CHARACTERS = 8 << 20  # of their texts together


class ConstraintCompiler:
    """Compiles for ``tokenizer``. Safe to call from several threads.

    vocab_size: of the model, which may have more tokens than the tokenizer. eos_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._kept: OrderedDict[tuple[Constraint, str], CompiledConstraint] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint, before: str) -> CompiledConstraint:
        """The constraint of answers that continue prompts which end in ``before`` (the chat template's end).

        LLM_INVALID_CONSTRAINT.
        """
        with self._lock:
            key = (constraint, before if constraint.kind == "choices" else _space(before))
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = self._compile(constraint, before)
                self._characters += _characters(constraint)
                while len(self._kept) > 1 and (len(self._kept) > _MOST_KEPT or self._characters > _MOST_CHARACTERS):
                    (oldest, _), _ = self._kept.popitem(last=False)
                    self._characters -= _characters(oldest)
            else:
                self._kept.move_to_end(key)
            return found

    def _compile(self, constraint: Constraint, before: str) -> CompiledConstraint:
        if constraint.kind == "choices":
            choices = list(dict.fromkeys(constraint.choices))
            return Labels(choices, self._continuations(before, choices), self._eos_ids)
        from spark_llm.engine.constraints.grammar import Grammar
        from spark_llm.engine.constraints.schema import grammar_of

        grammar = grammar_of(constraint, spaced=bool(_space(before)))
        return Grammar(self._llguidance, grammar, KIND_NAMES[constraint.kind])

    def _continuations(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        """The tokens with which a model goes on after ``before`` to write each of ``texts``.

        Texts are tokenised after ``before``, so that the seam is as models know it from training; where that would
        change the tokens of ``before``, which are computed already, apart from it.
        """
        space = _space(before)
        seam, *joined = self._ids([before, *(before + space + text if text else before for text in texts)])
        return [
            whole[len(seam) :] if whole[: len(seam)] == seam else self._ids([space + text])[0]
            for whole, text in zip(joined, texts, strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @functools.cached_property
    def _llguidance(self) -> LLTokenizer:
        """The tokenizer as llguidance needs it: about a second, once. Engines without grammars do not load it."""
        from llguidance import LLTokenizer

        if not self._eos_ids:
            reason = "the model has no token that ends an answer"
            raise LlmError("LLM_INVALID_CONSTRAINT", kind="grammar", reason=reason)
        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=list(self._eos_ids))


def _characters(constraint: Constraint) -> int:
    return len(constraint.text) + sum(map(len, constraint.choices))


def _space(before: str) -> str:
    """What models put between ``before`` and an answer: a space, unless it ends in white space, as most templates do.

    Not so prompts without a template, and templates that end in a special token (Mistral's). Answers' texts are without
    outer white space.
    """
    return "" if before[-1:].isspace() else " "
