"""Gives one row what its next tokens need: pages, and the prefixes that the index knows; and takes it back."""

from __future__ import annotations

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.cache.pool import Pages
from spark_llm.engine.cache.radix import Node
from spark_llm.engine.scheduling.lanes import Lanes
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row, RowState, Scheduled


class Reserving:
    """Pages and locks of rows that have a lane."""

    def __init__(self, cache: CacheManager, lanes: Lanes) -> None:
        self.cache = cache
        self.lanes = lanes

    def reserve(self, row: Row, before: RowState, step: int, budget: int) -> Scheduled | None:
        """Give a row the pages for its next tokens and put full prompt pages into the index.

        None: there are too few pages, and the row is as ``before`` says.
        """
        start, count = row.num_computed, min(row.remaining, budget)
        missing = self.cache.pages_for(start + count) - row.num_pages
        if missing > 0:
            pages = self.cache.allocate(missing)
            if pages is None:
                self.undo(row, before)
                return None
            row.pages[row.num_pages : row.num_pages + missing] = pages
            row.num_pages += missing
        row.count_computed(start, start + count)
        row.num_computed += count
        self._index(row, step)
        samples = row.num_computed == row.num_tokens
        lane = row.lane
        if samples:
            self.lanes.begin(row)
        else:
            self.lanes.num_pages[lane] = row.num_pages
        return Scheduled(row, start, count, samples, lane, int(self.lanes.generation[lane]), before)

    def extend_match(self, row: Row) -> None:
        """Adopt what the index knows of the row's next tokens; at least one token is left to compute."""
        size = self.cache.page_size
        at = row.tree_pages * size
        if row.detached or row.num_computed != at or row.num_pages != row.tree_pages:
            return
        node, found = self.cache.tree.match(row.tokens[at : row.num_tokens - 1], row.node)
        if not found:
            return
        self.move(row, node)
        table = row.pages
        for pages in found:
            table[row.num_pages : row.num_pages + len(pages)] = pages
            row.num_pages += len(pages)
        row.tree_pages = row.num_pages
        row.num_computed = row.num_pages * size
        row.count_matched(at, row.num_computed)

    def undo(self, row: Row, before: RowState) -> None:
        """Let the row be as it was; pages that it was given since are the caller's business."""
        self.move(row, before.node)
        row.restore(before)
        self.lanes.num_pages[row.lane] = row.num_pages

    def move(self, row: Row, node: Node) -> None:
        """Let the row stand on another node of its path, above or below."""
        if node.end > row.node.end:
            self.cache.tree.lock(node, row.node)
        elif node is not row.node:
            self.cache.tree.unlock(row.node, node)
        row.node = node

    def release(self, row: Row, in_flight: list[StepPlan]) -> Pages:
        """The row leaves its lane; returns its private pages (a copy), which nobody owns now.

        A node that a step in flight still has to fill stays locked until that step is done.
        """
        pages = row.pages[row.tree_pages : self.lanes.num_pages[row.lane]].copy()
        plan = next((plan for plan in in_flight if plan.step == row.node.step), None)
        if plan is not None:
            plan.held.append(row.node)
        else:
            self.cache.tree.unlock(row.node)
        row.node = self.cache.tree.root
        row.num_pages = row.tree_pages = 0
        self.lanes.leave(row)
        return pages

    def let_go(self, plan: StepPlan) -> None:
        """The step is done: what it kept locked for rows that left need not stay."""
        for node in plan.held:
            self.cache.tree.unlock(node)

    def _index(self, row: Row, step: int) -> None:
        size = self.cache.page_size
        full = min(row.num_computed, row.num_prompt) // size
        if row.detached or full <= row.tree_pages:
            return
        tokens = row.tokens[row.tree_pages * size : full * size].copy()
        child = self.cache.tree.insert(row.node, tokens, row.pages[row.tree_pages : full].copy(), step, row.key)
        if child is None:  # the same prompt is there already: this row had to compute its last tokens itself
            row.detached = True
            return
        self.move(row, child)
        row.tree_pages = full
