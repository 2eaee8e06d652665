"""Rows with a lane: how they come to run, and what they give back when they do not any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.scheduling.lanes import Lanes
from spark_llm.engine.scheduling.plan import NO_LANES, StepPlan
from spark_llm.engine.scheduling.reserving import Reserving

if TYPE_CHECKING:
    from spark_llm.engine.scheduling.row import Row


class Running:
    """rows: in the order in which they were admitted. filling: of these, those that do not decode.

    in_flight: the steps that are planned and not done yet, oldest first; the scheduler's list.
    """

    def __init__(self, cache: CacheManager, lanes: Lanes, in_flight: list[StepPlan]) -> None:
        self.cache = cache
        self.lanes = lanes
        self.reserving = Reserving(cache, lanes)
        self.in_flight = in_flight
        self.rows: dict[Row, None] = {}
        self.filling: dict[Row, None] = {}

    def newest(self) -> Row:
        """The row that was admitted last; one runs."""
        return next(reversed(self.rows))

    def enter(self, row: Row, *, fills: bool) -> None:
        """The row has a lane, and what its first share of a step needs."""
        self.rows[row] = None
        if fills:
            self.filling[row] = None
        assert row.account is not None
        row.account.running += 1
        row.account.user.running += 1

    def leave(self, row: Row) -> None:
        """The row runs no more; its lane and pages are the caller's business."""
        del self.rows[row]
        self.filling.pop(row, None)
        assert row.account is not None
        row.account.running -= 1
        row.account.user.running -= 1

    def release(self, *rows: Row) -> None:
        """Rows leave, with their lanes; their pages are free."""
        pages = [NO_LANES]
        for row in rows:
            self.leave(row)
            pages.append(self.reserving.release(row, self.in_flight))
        self.cache.pool.release(np.concatenate(pages))
