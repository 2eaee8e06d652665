"""A plan laid flat for the device: decoding rows first, then short prompt rests, then long chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spark_llm.engine.cuda.attention_plan import Device, Layout, Members
from spark_llm.engine.cuda.chooser import HostChoices
from spark_llm.engine.cuda.inputs import Ints
from spark_llm.engine.cuda.sampler import Sampling, sampling_of
from spark_llm.engine.scheduling.lanes import Lanes, PageUpdates
from spark_llm.engine.scheduling.plan import StepPlan
from spark_llm.engine.scheduling.row import Row, Scheduled

_LEVELS = 4  # of shared prefixes that are told apart
_REFRESHED = 256  # decoding rows a step whose prefixes are looked up anew: rows that joined since may share them


@dataclass(slots=True)
class HostStep:
    """T tokens: those of ``decodes`` decoding rows, whose ids only the device knows, of other members, of long chunks.

    Rows that went back by one token decode as well, so that their steps may replay a graph: first the device is told
    that ``told_tokens[i]`` is what the row in lane ``told[i]`` sampled last.

    last: the tokens that sample. answer_order: where the plan's n-th sampling row is among ``last``.
    """

    tokens: Ints
    positions: Ints
    lanes: Ints
    members: Members
    long_rows: npt.NDArray[np.int64]
    decodes: int
    told: Ints
    told_tokens: Ints
    last: Ints
    answer_order: npt.NDArray[np.int64]
    sampling: Sampling | None

    @property
    def only_decodes(self) -> bool:
        """Whether all rows decode: such a step may replay a graph."""
        return self.decodes == len(self.tokens)


@dataclass(slots=True)
class StepInputs:
    """All that a rank must know to run a step. updates: of its flat page table, see ``flat_updates``.

    choices: of its constrained rows; None: there are none.
    """

    updates: tuple[Ints, Ints]
    step: HostStep
    layout: Layout
    choices: HostChoices | None = None


class SharedPrefixes:
    """Where the shared prefixes of decoding rows end, by lane: looked up when a row begins, and now and then."""

    def __init__(self, lanes: int) -> None:
        self._ends = np.zeros((lanes, _LEVELS), np.int64)
        self._known: npt.NDArray[np.int64] = np.full(lanes, -1)  # generation of the lane whose ends these are
        self._turn = 0

    def of(self, lanes: Lanes, decode: Ints) -> npt.NDArray[np.int64]:
        """int64 [rows, levels]; see Members.ends."""
        generations = lanes.generation[decode]
        stale = self._known[decode] != generations
        self._turn = (self._turn + _REFRESHED) % max(1, len(decode))
        stale[self._turn : self._turn + _REFRESHED] = True
        for lane in decode[stale].tolist():
            row = lanes.rows[lane]
            assert row is not None, "a planned lane has a row"
            self._ends[lane] = shared_ends(row, row.num_prompt)
        self._known[decode] = generations
        return self._ends[decode]


def flat_updates(updates: PageUpdates, width: int) -> tuple[Ints, Ints]:
    """Indices into a flat page table of ``width`` columns, and the pages that belong there."""
    counts = updates.counts.astype(np.int64)
    ends = np.cumsum(counts)
    offsets = updates.lanes.astype(np.int64) * width + updates.firsts - (ends - counts)
    at = np.repeat(offsets, counts) + np.arange(len(updates.pages))
    return at.astype(np.int32), updates.pages


def shared_ends(row: Row, start: int) -> npt.NDArray[np.int64]:
    """Where the prefixes end that other running rows stand on too, up to ``start``; shallowest first, then 0."""
    found: list[int] = []
    node = row.node
    locks = 1
    while node is not None and node.parent is not None:
        if node.locks > locks and node.end <= start:
            locks = node.locks
            found.append(node.end)
        node = node.parent
    ends = np.zeros(_LEVELS, np.int64)
    kept = found[:_LEVELS][::-1]
    ends[: len(kept)] = kept
    return ends


def lay_flat(plan: StepPlan, prefixes: SharedPrefixes, device: Device) -> HostStep:
    """The step's tokens in the device's order."""
    again = [s for s in plan.rows if s.count == 1 and s.samples and s.start >= s.row.num_prompt]
    told = np.array([s.lane for s in again], np.int32)
    told_tokens = np.array([s.row.tokens[s.start] for s in again], np.int32)
    decode = np.concatenate((plan.decode, told))
    decode_at = np.concatenate((plan.positions, np.array([s.start for s in again], np.int32)))
    decodes = len(decode)
    ids = set(map(id, again))
    rest = [s for s in plan.rows if id(s) not in ids] if again else plan.rows
    most = 2 * device.own_tile // device.group if device.cascade else 0  # tokens of a short rest
    short = [s for s in rest if s.count <= most]
    long = [s for s in rest if s.count > most]
    prompts = short + long
    counts = np.fromiter((s.count for s in prompts), np.int64, len(prompts))
    first = decodes + np.cumsum(counts) - counts
    starts = np.fromiter((s.start for s in prompts), np.int64, len(prompts))
    lanes = np.fromiter((s.lane for s in prompts), np.int64, len(prompts))
    decode_lanes = decode.astype(np.int64)
    positions = np.repeat(starts - first, counts) + np.arange(decodes, decodes + int(counts.sum()))
    n = len(short)
    ends = np.zeros((decodes + n, _LEVELS), np.int64)
    if decodes:
        ends[:decodes] = prefixes.of(plan.lanes, decode)
    for i, scheduled in enumerate(short):
        ends[decodes + i] = shared_ends(scheduled.row, scheduled.start)
    members = Members(
        lane=np.concatenate((decode_lanes, lanes[:n])),
        first=np.concatenate((np.arange(decodes), first[:n])),
        count=np.concatenate((np.ones(decodes, np.int64), counts[:n])),
        start=np.concatenate((decode_at.astype(np.int64), starts[:n])),
        ends=ends,
    )
    tokens = [np.zeros(decodes, np.int32), *(s.row.tokens[s.start : s.start + s.count] for s in prompts)]
    samples = np.fromiter((s.samples for s in prompts), bool, len(prompts))
    last = np.concatenate((np.arange(decodes), (first + counts - 1)[samples])).astype(np.int32)
    sampling = None
    if plan.lanes.draws[np.concatenate((decode, lanes[samples]))].any():
        rows = [*plan.lanes.rows_of(decode), *(s.row for s in prompts if s.samples)]
        sampling = sampling_of(rows, np.concatenate((decode_at, (starts + counts - 1)[samples])).astype(np.int64))
    return HostStep(
        tokens=np.concatenate(tokens),
        positions=np.concatenate((decode_at, positions)).astype(np.int32),
        lanes=np.concatenate((decode_lanes, np.repeat(lanes, counts))).astype(np.int32),
        members=members,
        long_rows=np.stack((first[n:], counts[n:], lanes[n:], starts[n:]), axis=1),
        decodes=decodes,
        told=told,
        told_tokens=told_tokens,
        last=last,
        answer_order=_answer_order(plan, [*again, *(s for s in prompts if s.samples)]),
        sampling=sampling,
    )


def _answer_order(plan: StepPlan, samples: Sequence[Scheduled]) -> npt.NDArray[np.int64]:
    """The plan's answers: first plan.rows that sample, in their order, then plan.decode; these are the device's first,
    followed by ``samples``."""
    decodes = len(plan.decode)
    place = {id(s): decodes + i for i, s in enumerate(samples)}
    return np.array([*(place[id(s)] for s in plan.rows if s.samples), *range(decodes)], np.int64)
