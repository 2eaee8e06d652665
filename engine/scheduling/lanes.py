"""Running rows by lane: arrays instead of objects, so that a decoding row costs a step no Python of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spark_llm.engine.scheduling.row import Row

Ints = npt.NDArray[np.int32]
Wide = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PageUpdates:
    """Pages that lanes have got: those of run i follow one another from ``firsts[i]`` on in the table of ``lanes[i]``.

    lanes, firsts, counts: int32 [runs]. pages: int32 [sum of counts], the runs' page numbers one after the other.
    """

    lanes: Ints
    firsts: Ints
    counts: Ints
    pages: Ints

    def __len__(self) -> int:
        return len(self.lanes)


class Lanes:
    """A running row has a lane, a number in [0, count), from its admission on until it leaves.

    A row *decodes* once a step is planned that computes the last of its known tokens. From then on its counters are
    here, by lane, and run ahead of what is known: planning a step counts its tokens as computed.

    ::

        computed   tokens whose K/V is there, or will be once the planned steps ran (of rows that decode)
        known      prompt and committed answer: the step in flight adds one
        prompt     tokens of the prompt;  limit: tokens when the row is done
        num_pages  pages that the row holds;  told: of these, those that a plan's page updates have named
        table      int32 [count, grows]: page numbers;  answers: int32 [count, grows]: committed tokens

    generation: changes when a lane's row leaves or goes back, so that a late token finds out that it is not wanted.
    guesses: constrained rows may be sampled without masks (see trust.py); pays with steps in flight only.
    """

    def __init__(self, count: int, page_size: int, *, guesses: bool = False) -> None:
        self.count = count
        self.page_size = page_size
        self.guesses = guesses
        self.rows: list[Row | None] = [None] * count
        self.generation: Wide = np.zeros(count, np.int64)
        self.decodes: Flags = np.zeros(count, np.bool_)
        self.computed: Wide = np.zeros(count, np.int64)
        self.known: Wide = np.zeros(count, np.int64)
        self.prompt: Wide = np.zeros(count, np.int64)
        self.limit: Wide = np.zeros(count, np.int64)
        self.num_pages: Wide = np.zeros(count, np.int64)
        self.told: Wide = np.zeros(count, np.int64)
        self.ignores_eos: Flags = np.zeros(count, np.bool_)
        self.is_checked: Flags = np.zeros(count, np.bool_)  # a stop checker wants each token
        self.constrained: Flags = np.zeros(count, np.bool_)
        self.waits: Flags = np.zeros(count, np.bool_)  # a list or mask hangs on its last token: planned when known
        self.num_constrained = 0
        self.draws: Flags = np.zeros(count, np.bool_)  # temperature above 0
        self.account: Ints = np.zeros(count, np.int32)  # slot of the query that the row is charged to
        self.table: Ints = np.zeros((count, 16), np.int32)
        self.answers: Ints = np.zeros((count, 16), np.int32)
        self._free = list(range(count - 1, -1, -1))
        self._decoding: Ints = np.empty(0, np.int32)
        self._joined: list[int] = []
        self._left = False
        self._entered = 0

    @property
    def free(self) -> int:
        """Lanes without a row."""
        return len(self._free)

    @property
    def decoding(self) -> Ints:
        """Lanes of rows that decode, in the order in which they began to; not of those that lacked one token only."""
        if self._joined or self._left:
            merged = np.concatenate([self._decoding, np.array(self._joined, np.int32)])
            self._decoding = merged[self.decodes[merged]] if self._left else merged
            self._joined, self._left = [], False
        return self._decoding

    def enter(self, row: Row) -> None:
        """Give the row a lane; ValueError if there is none."""
        if not self._free:
            raise ValueError("all lanes are taken")
        lane = row.lane = self._free.pop()
        row.lanes = self
        row.turn = self._entered
        self._entered += 1
        self.rows[lane] = row
        params = row.request.params
        self.known[lane] = row.num_tokens
        self.prompt[lane] = row.num_prompt
        self.limit[lane] = row.limit
        self.ignores_eos[lane] = params.ignore_eos
        self.is_checked[lane] = row.request.is_stopped is not None
        self.draws[lane] = params.temperature > 0
        self.constrained[lane] = row.request.constraint is not None
        self.waits[lane] = row.request.constraint is not None and not (self.guesses and row.may_guess())
        self.num_constrained += row.request.constraint is not None
        self.account[lane] = row.account.slot if row.account is not None else 0
        self.table = _widen(self.table, -(-row.limit // self.page_size))
        self.answers = _widen(self.answers, params.max_tokens)
        if row.output:
            self.answers[lane, : len(row.output)] = row.output

    def leave(self, row: Row) -> None:
        """Take the row's lane away; pages and locks are the caller's business."""
        lane = row.lane
        self._left |= bool(self.decodes[lane])
        self.decodes[lane] = False
        self.generation[lane] += 1
        self.num_constrained -= bool(self.constrained[lane])
        self.constrained[lane] = self.waits[lane] = False
        self.num_pages[lane] = self.told[lane] = 0
        self.rows[lane] = None
        self._free.append(lane)
        row.lane, row.lanes = -1, None

    def begin(self, row: Row) -> None:
        """The row, whose known tokens are all computed by the planned step, decodes from now on."""
        if self._left:
            _ = self.decoding  # a lane that left must not be taken for one that joins
        lane = row.lane
        self.decodes[lane] = True
        self.computed[lane] = row.num_computed
        self.num_pages[lane] = row.num_pages
        if row.num_computed + 1 < row.limit:
            self._joined.append(lane)

    def end(self, row: Row) -> None:
        """The row does not decode any more; its counters are its own again, and up to date."""
        self.refresh(row)
        if self.decodes[row.lane]:
            row.high_water = max(row.high_water, row.num_computed)
            self.decodes[row.lane] = False
            self._left = True

    def refresh(self, row: Row) -> None:
        """Bring the row's counters and answer up to date."""
        lane = row.lane
        row.learn(self.output(row))
        if self.decodes[lane]:
            row.num_computed = int(self.computed[lane])
            row.num_pages = int(self.num_pages[lane])

    def output(self, row: Row) -> list[int]:
        """The row's answer as far as it is known."""
        known = int(self.known[row.lane]) - row.num_prompt
        tokens: list[int] = self.answers[row.lane, :known].tolist()
        return tokens

    def step_back(self, row: Row) -> None:
        """A step that was to decode the row failed: its token is computed again, as one that is known."""
        if self.decodes[row.lane]:
            self.computed[row.lane] -= 1
            self.end(row)
        else:
            row.num_computed -= 1
            row.high_water = min(row.high_water, row.num_computed)
        row.lost += 1

    def go_back(self, row: Row, computed: int) -> None:
        """The row's known tokens from ``computed`` on are computed like a prompt's; before that they are computed.

        What steps in flight compute and sample for it does not count.
        """
        lane = row.lane
        self.generation[lane] += 1
        if self.decodes[lane]:
            self.computed[lane] = computed
        else:
            row.num_computed = computed
        self.end(row)

    def in_flight(self, row: Row) -> int:
        """Tokens of the row's answer that are planned and not known."""
        ahead = int(self.computed[row.lane] + 1 - self.known[row.lane])
        return ahead if self.decodes[row.lane] else 0

    def input_tokens(self, lanes: Ints, positions: Ints) -> Ints:
        """Tokens of answers at ``positions`` of the rows, both int32 [n]; they must be known."""
        tokens: Ints = self.answers[lanes, positions - self.prompt[lanes]]
        return tokens

    def take(self, lanes: Ints, tokens: Ints) -> None:
        """Add a token to the answer of each lane."""
        known = self.known[lanes]
        self.answers[lanes, known - self.prompt[lanes]] = tokens
        self.known[lanes] = known + 1

    def follow(self, row: Row, tokens: list[int]) -> int:
        """Add tokens to the row's answer that no step has sampled; returns how many its limit has allowed."""
        lane = row.lane
        known = int(self.known[lane])
        count = min(len(tokens), int(self.limit[lane]) - known)
        self.answers[lane, known - row.num_prompt :][:count] = tokens[:count]
        self.known[lane] = known + count
        return count

    def add_pages(self, lanes: Ints, counts: Wide, pages: Ints) -> None:
        """Lane i gets the next ``counts[i]`` of ``pages``."""
        self.table.reshape(-1)[self._places(lanes, self.num_pages[lanes], counts)] = pages
        self.num_pages[lanes] += counts

    def take_pages(self, lanes: Ints, keep: Wide) -> Ints:
        """Leave each lane ``keep`` pages; returns the others."""
        pages: Ints = self.table.reshape(-1)[self._places(lanes, keep, self.num_pages[lanes] - keep)]
        self.num_pages[lanes] = keep
        self.told[lanes] = np.minimum(self.told[lanes], keep)
        return pages

    def updates(self) -> PageUpdates:
        """The pages that have not been told yet; from now on they have."""
        lanes = np.flatnonzero(self.told < self.num_pages).astype(np.int32)
        firsts = self.told[lanes]
        counts = self.num_pages[lanes] - firsts
        pages: Ints = self.table.reshape(-1)[self._places(lanes, firsts, counts)]
        self.told[lanes] = self.num_pages[lanes]
        return PageUpdates(lanes, firsts.astype(np.int32), counts.astype(np.int32), pages)

    def retell(self, updates: PageUpdates) -> None:
        """Whoever was told may not have heard it."""
        self.told[updates.lanes] = np.minimum(self.told[updates.lanes], updates.firsts)

    def are_here(self, lanes: Ints, generations: Wide) -> Flags:
        """Whether the rows that lanes had in these generations are still in them."""
        here: Flags = self.generation[lanes] == generations
        return here

    def rows_of(self, lanes: Ints) -> Iterable[Row]:
        """The rows in lanes that have one."""
        return (row for lane in lanes.tolist() if (row := self.rows[lane]) is not None)

    def _places(self, lanes: Ints, firsts: Wide, counts: Wide) -> Wide:
        """Indices into the flat table: of each lane ``counts[i]`` columns from ``firsts[i]`` on."""
        ends = np.cumsum(counts)
        offsets = lanes.astype(np.int64) * self.table.shape[1] + firsts - (ends - counts)
        places: Wide = np.repeat(offsets, counts) + np.arange(ends[-1] if len(ends) else 0)
        return places


def _widen(table: Ints, columns: int) -> Ints:
    if columns <= table.shape[1]:
        return table
    wide = np.zeros((len(table), max(columns, 2 * table.shape[1])), np.int32)
    wide[:, : table.shape[1]] = table
    return wide
