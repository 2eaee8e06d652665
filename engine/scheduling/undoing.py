"""Takes back what a step that failed was planned to compute: rows, pages and charges are as before it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spark_llm.engine.scheduling.charging import Charging
from spark_llm.engine.scheduling.plan import NO_LANES, StepPlan
from spark_llm.engine.scheduling.row import Row
from spark_llm.engine.scheduling.running import Running
from spark_llm.engine.scheduling.waiting import WaitingQueue


def undo_decode(plan: StepPlan, running: Running) -> list[Row]:
    """What was to be decoded is computed again from known tokens: what the device holds as last may be wrong."""
    lanes = running.lanes
    here = lanes.are_here(plan.decode, plan.generations[len(plan.sampling) :])
    rows = list(lanes.rows_of(plan.decode[here]))
    for row in rows:
        lanes.step_back(row)
        running.filling[row] = None
    return rows


def undo_shares(
    plan: StepPlan, running: Running, waiting: WaitingQueue, charging: Charging, here: Mapping[int, Row]
) -> list[Row]:
    """Rows that got a share of the step are as before it; those that it admitted wait again. here: all rows, by id."""
    lanes, cache = running.lanes, running.cache
    keep, private, rows = [NO_LANES], [NO_LANES], []
    for scheduled in reversed(plan.rows):
        row, before = scheduled.row, scheduled.before
        if row.lane != scheduled.lane or lanes.generation[row.lane] != scheduled.generation:
            # It left while the step was in flight. Where it will come again, what it computed counts as computed.
            if here.get(row.request.id) is row:
                charging.keep_share(scheduled.charge)
            else:
                charging.undo_share(row, scheduled.charge)
            continue
        assert before is not None
        charging.undo_share(row, scheduled.charge)
        lanes.end(row)
        private.append(row.pages[max(row.tree_pages, before.num_pages) : row.num_pages].copy())
        keep.append(row.pages[before.tree_pages : before.num_pages].copy())
        running.reserving.undo(row, before)
        row.lost += scheduled.count
        rows.append(row)
        if scheduled.admitted:
            running.leave(row)
            lanes.leave(row)
            waiting.push_back(row)
        else:
            running.filling[row] = None
    cache.rollback(plan.step, np.concatenate(keep))
    cache.pool.release(np.concatenate(private))
    return rows
