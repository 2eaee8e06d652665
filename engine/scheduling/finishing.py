"""What sampled tokens mean for their rows: longer answers, and rows that are done."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.request import FinishReason
from spark_llm.engine.scheduling.lanes import Ints, Lanes
from spark_llm.engine.scheduling.row import Row


class Finishing:
    """Only a row that ends, or that a stop checker looks at, costs Python of its own."""

    def __init__(self, cache: CacheManager, lanes: Lanes) -> None:
        self.cache = cache
        self.lanes = lanes

    def take(self, at: Ints, tokens: Ints, eos_ids: Collection[int]) -> list[tuple[Row, FinishReason]]:
        """Add tokens[i] to the answer of the row in lane at[i]. Returns the rows that are done, with whole answers."""
        lanes = self.lanes
        lanes.take(at, tokens)
        stops = np.zeros(len(at), np.bool_)
        for eos in eos_ids:
            stops |= tokens == eos
        stops &= ~lanes.ignores_eos[at]
        for i in np.flatnonzero(lanes.is_checked[at] & ~stops):
            stops[i] = _is_stopped(lanes.rows[at[i]], int(tokens[i]))
        for row in lanes.rows_of(at[~lanes.decodes[at]]):
            lanes.refresh(row)  # it was rolled back out of a later step, and has to know its tokens
        ended = []
        for i in np.flatnonzero(stops | (lanes.known[at] >= lanes.limit[at])):
            row = lanes.rows[at[i]]
            assert row is not None
            row.output = lanes.output(row)
            ended.append((row, FinishReason.STOP if stops[i] else FinishReason.LENGTH))
        return ended

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
