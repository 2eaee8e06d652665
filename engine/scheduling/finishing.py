"""What sampled tokens mean for their rows: longer answers, and rows that are done."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.request import FinishReason
from spark_llm.engine.scheduling.lanes import Flags, Floats, Ints, Lanes
from spark_llm.engine.scheduling.matching import Matched, Matching
from spark_llm.engine.scheduling.row import Row


class Taken(NamedTuple):
    """ended: rows that are done, with whole answers. back: rows whose next tokens are known, and are computed like a
    prompt's. refused: places of the tokens that were not taken.
    """

    ended: list[tuple[Row, FinishReason]]
    back: list[Row]
    refused: list[int]


class Finishing:
    """Only a row that ends, that is constrained, or that a stop checker looks at, costs Python of its own."""

    def __init__(self, cache: CacheManager, lanes: Lanes) -> None:
        self.cache = cache
        self.lanes = lanes
        self.matching = Matching(lanes)

    def take(
        self,
        at: Ints,
        tokens: Ints,
        eos_ids: Collection[int],
        log_probs: Floats | None = None,
        guessed: Flags | None = None,
    ) -> Taken:
        """Add tokens[i] to the answer of the row in lane at[i], unless the row's constraint refuses it.

        log_probs: of tokens that were chosen among candidates. guessed: which tokens of constrained rows were sampled
        without a mask; None: no one.
        """
        lanes = self.lanes
        matched = self.matching.take(at, tokens, log_probs, guessed) if lanes.num_constrained else Matched()
        if matched.refused:
            at, tokens = np.delete(at, matched.refused), np.delete(tokens, matched.refused)
        lanes.take(at, tokens)
        stops = np.zeros(len(at), np.bool_)
        for eos in eos_ids:
            stops |= tokens == eos
        stops &= ~lanes.ignores_eos[at]
        for i in np.flatnonzero(lanes.is_checked[at] & ~stops):
            stops[i] = _is_stopped(lanes.rows[at[i]], int(tokens[i]))
        for row in lanes.rows_of(at[~lanes.decodes[at]]):
            lanes.refresh(row)  # it was rolled back out of a later step, and has to know its tokens
        if lanes.num_constrained:
            self.matching.follow(matched)
            stops = np.where(lanes.constrained[at], np.isin(at, matched.whole), stops)
        ended = []
        for i in np.flatnonzero(stops | (lanes.known[at] >= lanes.limit[at])):
            row = lanes.rows[at[i]]
            assert row is not None
            row.output = lanes.output(row)
            ended.append((row, FinishReason.STOP if stops[i] else FinishReason.LENGTH))
        return Taken(ended, matched.back, matched.refused)

    def failure(self, row: Row, reason: FinishReason) -> tuple[str, dict[str, str]] | None:
        """Why the answer of a row that is done is none: it does not keep to its constraint."""
        constraint, matcher = row.request.constraint, row.matcher
        if constraint is None or matcher is None:
            return None
        if matcher.error is not None:
            return "LLM_CONSTRAINT_FAILED", {"kind": constraint.kind, "reason": matcher.error}
        if reason is FinishReason.LENGTH and not matcher.is_whole:
            max_tokens = str(row.request.params.max_tokens)
            return "LLM_ANSWER_INCOMPLETE", {"kind": constraint.kind, "max_tokens": max_tokens}
        return None

    def leave_marks(self, row: Row) -> None:
        """Tell eviction that a row is done, whose prefix later calls may need."""
        hints = row.request.hints
        if hints is not None and hints.shared_tokens and row.request.reuse:
            node, _ = self.cache.tree.match(row.tokens[: hints.shared_tokens])
            self.cache.eviction.done(node, hints)


def _is_stopped(row: Row | None, token: int) -> bool:
    assert row is not None
    assert row.request.is_stopped is not None
    row.output.append(token)
    return row.request.is_stopped(row.output)
