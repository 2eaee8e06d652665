"""What one step computes: shares of rows that fill their prompts, and lanes of rows that decode."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spark_llm.engine.cache.radix import Node
from spark_llm.engine.constraints.matcher import Matcher
from spark_llm.engine.constraints.step import StepChoices, choices_of
from spark_llm.engine.scheduling.lanes import Flags, Ints, Lanes, PageUpdates, Wide
from spark_llm.engine.scheduling.row import Row, Scheduled

NO_LANES: Ints = np.empty(0, np.int32)
NO_UPDATES = PageUpdates(NO_LANES, NO_LANES, NO_LANES, NO_LANES)


def _none() -> Ints:
    return NO_LANES


@dataclass(slots=True)
class StepPlan:
    """``rows`` in the order in which they were planned, then ``decode``; tokens are sampled in this order, too.

    rows: parts of prompts, and resumed rows; all their tokens are known. sampling: int32, lanes of those that sample.
    decode: int32 [d], lanes that compute one token each, at ``positions`` (int32 [d]): the one sampled last, which
    the host may not know yet.
    page_updates: what the lanes' page tables have got since the plan before; a lane whose row is new begins at 0.
    alone: one row of a step that failed, by itself. generations, accounts: of the lanes in ``sampling`` and ``decode``.
    choices: what its constrained rows may answer; None: there are none, or all are in ``guessed``.
    guessed: of the lanes in ``sampling`` and ``decode``, which are of constrained rows that are sampled like free ones.
    held: nodes whose rows left while the step was in flight; it holds their locks until it is done.
    """

    step: int
    lanes: Lanes
    rows: list[Scheduled] = field(default_factory=list)
    sampling: Ints = field(default_factory=_none)
    decode: Ints = field(default_factory=_none)
    positions: Ints = field(default_factory=_none)
    generations: Wide = field(default_factory=lambda: np.empty(0, np.int64))
    accounts: Ints = field(default_factory=_none)
    page_updates: PageUpdates = NO_UPDATES
    alone: bool = False
    choices: StepChoices | None = None
    guessed: Flags = field(default_factory=lambda: np.empty(0, np.bool_))
    held: list[Node] = field(default_factory=list)

    def seal(self, decode: Ints) -> None:
        """All is decided: write it down for whoever runs it, and count the tokens of ``decode`` as computed."""
        lanes = self.lanes
        self.decode = decode
        self.positions = lanes.computed[decode].astype(np.int32)
        lanes.computed[decode] += 1
        self.sampling = np.array([s.lane for s in self.rows if s.samples], np.int32)
        sampled = np.concatenate([self.sampling, decode])
        self.generations = lanes.generation[sampled]
        self.accounts = lanes.account[sampled]
        self.page_updates = lanes.updates()
        waits = lanes.waits[sampled]
        self.guessed = lanes.constrained[sampled] & ~waits
        if lanes.num_constrained:
            for row in lanes.rows_of(self.sampling):
                row.match()  # from its tokens, which are all known now
        if waits.any():
            matchers: list[Matcher | None] = [None] * len(sampled)
            for place in np.flatnonzero(waits).tolist():
                matchers[place] = self._row(sampled[place]).match()
            self.choices = choices_of(matchers)

    def _row(self, lane: int) -> Row:
        row = self.lanes.rows[lane]
        assert row is not None
        return row

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(s.count for s in self.rows) + len(self.decode)

    @property
    def num_rows(self) -> int:
        """Rows that the step computes tokens of."""
        return len(self.rows) + len(self.decode)

    @property
    def num_sampled(self) -> int:
        """Tokens that the step samples."""
        return len(self.sampling) + len(self.decode)

    def shares(self) -> list[Scheduled]:
        """The share of every row, also of those that decode; between the plan and its commit or rollback."""
        shares = list(self.rows)
        generations = self.generations[len(self.sampling) :].tolist()
        for lane, start, generation in zip(self.decode.tolist(), self.positions.tolist(), generations, strict=True):
            row = self.lanes.rows[lane]
            if row is not None:
                shares.append(Scheduled(row, start, 1, samples=True, lane=lane, generation=generation))
        return shares
