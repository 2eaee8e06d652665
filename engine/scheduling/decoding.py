"""Pages of the rows that decode: reserved ahead, for all rows that need some in one go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.scheduling.lanes import Flags, Ints, Lanes, Wide
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row

# Answer tokens a running row is expected to still need when a new one asks for pages. All of max_tokens
# would leave most of the pool idle (answers end early); too few and rows are preempted.
_LOOKAHEAD = 32

# Rows that wait for their tokens, from which on they are worth two groups: half of them is still a step that the device
# hardly computes faster.
_MOST_TOGETHER = 256


class DecodeReserve:
    """Which lanes decode next, and their pages.

    A row whose pages are used up gets those of its next tokens, as many as it is expected to need, as long as pages are
    free; prefixes are evicted for the very next token only.

    in_flight: the planned steps, where one may run while another is planned; else None.
    """

    def __init__(self, cache: CacheManager, lanes: Lanes, in_flight: Sequence[StepPlan] | None = None) -> None:
        self.cache = cache
        self.lanes = lanes
        self.in_flight = in_flight

    def candidates(self, budget: int) -> Ints:
        """Lanes whose row lacks a token, also if those in flight all come; the first ``budget`` of them."""
        lanes = self.lanes
        decoding = lanes.decoding
        unfinished = lanes.computed[decoding] + 1 < lanes.limit[decoding]
        if lanes.num_constrained:  # what may follow a token that is not known yet is not known either
            waits = lanes.waits[decoding]
            unfinished &= ~waits | (lanes.computed[decoding] < lanes.known[decoding])
            if self.in_flight is not None and not self.in_flight and waits[unfinished].all():
                self._split(unfinished)
        return decoding[:budget] if unfinished.all() else decoding[unfinished][:budget]

    def _split(self, unfinished: Flags) -> None:
        """All rows lack what their tokens will say: the device would idle until they are known, and masks made.

        So one half of many goes first, and from then on the halves take turns.
        """
        every = np.flatnonzero(unfinished)
        if len(every) > _MOST_TOGETHER:
            unfinished[every[len(every) // 2 :]] = False

    def renew(self, decode: Ints) -> bool:
        """Give each of the lanes the page of its next token; False: there are too few, nothing changes.

        Before that, what others were given ahead is taken back.
        """
        lanes, size = self.lanes, self.cache.page_size
        short = decode[lanes.computed[decode] >= lanes.num_pages[decode] * size]
        if not len(short):
            return True
        wanted = self._expected(short)
        if wanted.sum() > self.cache.pool.free:
            wanted = np.ones(len(short), np.int64)
        if len(short) > self.cache.available and wanted.sum() > self._take_back():
            return False
        pages = self.cache.allocate(int(wanted.sum()))
        assert pages is not None
        lanes.add_pages(short, wanted, pages)
        return True

    def ahead(self) -> int:
        """Pages that rows which decode are expected to ask for."""
        return int(self._expected(self.lanes.decoding).sum())

    def ahead_of(self, row: Row) -> int:
        """Pages that a row which is planned is expected to ask for with its answer."""
        tokens = min(row.limit - 1, row.num_tokens + _LOOKAHEAD)
        return max(0, self.cache.pages_for(tokens) - max(row.num_pages, self.cache.pages_for(row.num_tokens)))

    def _expected(self, decode: Ints) -> Wide:
        """Pages that each lane is expected to ask for; the last token of an answer has no K/V."""
        lanes = self.lanes
        tokens = np.minimum(lanes.limit[decode] - 1, lanes.computed[decode] + _LOOKAHEAD)
        missing: Wide = -(-tokens // self.cache.page_size) - lanes.num_pages[decode]
        return np.maximum(missing, 0)

    def _take_back(self) -> int:
        """Free all pages but those of each lane's next token and before; how many pages are available then."""
        lanes = self.lanes
        every = np.flatnonzero(lanes.decodes).astype(np.int32)
        used = -(-(lanes.computed[every] + 1) // self.cache.page_size)
        spare = used < lanes.num_pages[every]
        self.cache.pool.release(lanes.take_pages(every[spare], used[spare]))
        return self.cache.available
