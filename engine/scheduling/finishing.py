"""What sampled tokens mean for their rows: longer answers, and rows that are done."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.request import FinishReason
from spark_llm.engine.scheduling.lanes import Flags, Floats, Ints, Lanes
from spark_llm.engine.scheduling.row import Row


class Finishing:
    """Only a row that ends, or that a stop checker looks at, costs Python of its own."""

    def __init__(self, cache: CacheManager, lanes: Lanes) -> None:
        self.cache = cache
        self.lanes = lanes
        self.forced_tokens = 0  # of answers, that no step had to sample

    def take(
        self, at: Ints, tokens: Ints, eos_ids: Collection[int], log_probs: Floats | None = None
    ) -> tuple[list[tuple[Row, FinishReason]], list[Row]]:
        """Add tokens[i] to the answer of the row in lane at[i]. Returns the rows that are done, with whole answers.

        log_probs: of tokens that were chosen among candidates. The second list: rows whose constraint forces what comes
        next: these tokens are known without a step, and are computed like a prompt's.
        """
        lanes = self.lanes
        lanes.take(at, tokens)
        stops = np.zeros(len(at), np.bool_)
        for eos in eos_ids:
            stops |= tokens == eos
        stops &= ~lanes.ignores_eos[at]
        for i in np.flatnonzero(lanes.is_checked[at] & ~stops):
            stops[i] = _is_stopped(lanes.rows[at[i]], int(tokens[i]))
        jumped = self._match(at, tokens, log_probs, stops) if lanes.num_constrained else []
        for row in lanes.rows_of(at[~lanes.decodes[at]]):
            lanes.refresh(row)  # it was rolled back out of a later step, and has to know its tokens
        ended = []
        for i in np.flatnonzero(stops | (lanes.known[at] >= lanes.limit[at])):
            row = lanes.rows[at[i]]
            assert row is not None
            row.output = lanes.output(row)
            ended.append((row, FinishReason.STOP if stops[i] else FinishReason.LENGTH))
        return ended, [row for row in jumped if lanes.known[row.lane] < row.limit]

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

    def _match(self, at: Ints, tokens: Ints, log_probs: Floats | None, stops: Flags) -> list[Row]:
        """Lets the matchers of constrained rows take their tokens, and says in ``stops`` whose answers are whole."""
        lanes = self.lanes
        jumped = []
        for i in np.flatnonzero(lanes.constrained[at]):
            row = lanes.rows[at[i]]
            assert row is not None
            assert row.matcher is not None
            assert row.request.constraint is not None
            forced = row.matcher.take(int(tokens[i]), 0.0 if log_probs is None else float(log_probs[i]))
            followed = lanes.follow(row, forced)
            self.forced_tokens += followed
            if followed < len(forced):  # no room for them: the answer ends before
                row.matcher = row.request.constraint.start(lanes.output(row))
            stops[i] = row.matcher.is_done
            if forced and not stops[i]:
                jumped.append(row)
        return jumped

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
