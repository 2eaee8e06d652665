"""Lengths of texts in tokens, for whoever plans and has no engine: a tokenizer alone, no weights, no torch."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from spark_llm.engine.config import Task
from spark_llm.engine.model.source import resolve
from spark_llm.engine.text.tokenizer import load_tokenizer
from spark_llm.errors import LlmError

log = logging.getLogger(__name__)

Lengths = Callable[[Sequence[str]], list[int]]

# A byte-pair tokenizer of English makes about one token of a short word, two of a long one, one of a digit or mark.
_PIECE = re.compile(r"[^\W\d_]{1,8}|\d|[^\w\s]|_|\n")


@functools.cache
def token_lengths(model: str, task: Task = "generate") -> Lengths:
    """Counts the tokens of texts as ``model`` reads them, without special tokens.

    Only what is on this machine is opened: for a model of the hub, or one whose tokenizer cannot be read here, the
    lengths are estimates (within about a fifth for English).
    """
    if model != "default" and not Path(model).exists():
        return estimated_lengths
    try:
        tokenizer = load_tokenizer(resolve(model, task)).tokenizer
    except (LlmError, OSError) as error:
        log.info("lengths are estimated: %s", error)
        return estimated_lengths

    def count(texts: Sequence[str]) -> list[int]:
        return [len(found.ids) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    return count


def estimated_lengths(texts: Sequence[str]) -> list[int]:
    """About how many tokens texts have, by their words, digits and marks."""
    return [len(_PIECE.findall(text)) for text in texts]
