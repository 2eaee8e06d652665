"""Prompts as sort keys, and how many leading tokens two of them share. Knows tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spark_llm.engine.request import TokenIds

KEY_BYTES = 4  # of a token in a key


def sort_key(tokens: TokenIds) -> bytes:
    """Bytes that sort as the tokens do; a prefix of the tokens has a prefix of the bytes."""
    return tokens.astype(">u4").tobytes()


def shared_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens two keys share."""
    length = min(len(a), len(b)) // KEY_BYTES
    return common_tokens(np.frombuffer(a, np.int32, length), np.frombuffer(b, np.int32, length))


def common_tokens(a: TokenIds, b: TokenIds) -> int:
    """How many leading tokens two prompts share."""
    length = min(len(a), len(b))
    if not length:
        return 0
    differs = a[:length] != b[:length]
    first = int(differs.argmax())
    return first if differs[first] else length


def shared_with_next(prompts: Sequence[TokenIds]) -> list[int]:
    """For each prompt how many leading tokens the one after it shares.

    Nothing follows the last one yet: its group is taken to go on, so what it shares with the one before counts.
    """
    shared = [common_tokens(prompts[at], prompts[at + 1]) for at in range(len(prompts) - 1)]
    return [*shared, shared[-1] if shared else 0][: len(prompts)]
