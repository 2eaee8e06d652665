"""Which queries of a step attend to which keys, in as few and as dense products as possible.

A prefix that several rows of the step stand on becomes one block: their queries side by side over the
prefix's K/V, read once (cascade attention, to any depth of the radix tree). What is left of each row, its own
tokens, is a causal block. Blocks of like shape are padded into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from spark_llm.engine.cache.radix import Node
from spark_llm.engine.scheduling.row import Row, Scheduled

Index = npt.NDArray[np.int64]

MIN_SHARED = 32  # tokens: a shorter common run is cheaper read once per row than merged
QUERY_TILE = 128  # tokens: longer chunks are cut, so that a tile sees only the keys up to its own end
_PADDING = 1.25  # padded area over real area that a batch may have
_MAX_AREA = 1 << 23  # query-key pairs a batch and kv head group, so that masks stay within tens of MB


@dataclass(slots=True)
class Block:
    """Queries (indices into the step's tokens) over keys (slots of the K/V pool).

    causal: the queries are the last len(queries) keys, each sees those up to itself.
    """

    queries: Index
    keys: Index
    causal: bool = False


@dataclass(slots=True)
class BlockBatch:
    """Blocks padded to one shape: queries [R, M], keys [R, L].

    valid: which entries of ``queries`` are real, flat, or None if all are. hidden: [R, M, L] True where a
    query must not look, or None.
    """

    queries: Index
    keys: Index
    valid: Index | None
    hidden: npt.NDArray[np.bool_] | None


@dataclass(slots=True)
class AttentionPlan:
    """Level 0 covers each token exactly once; every further batch has each token at most once."""

    own: list[BlockBatch] = field(default_factory=list)
    shared: list[BlockBatch] = field(default_factory=list)


def plan_attention(rows: Sequence[Scheduled], offsets: Index, page_size: int, *, cascade: bool) -> AttentionPlan:
    """rows[i] computes the step's tokens offsets[i] .. offsets[i + 1]. cascade False: no shared blocks."""
    plan = AttentionPlan()
    levels, own_start = _shared_blocks(rows, offsets, page_size) if cascade else ({}, np.zeros(len(rows), int))
    own: list[Block] = []
    for i, s in enumerate(rows):
        own += _tiles(int(offsets[i]), s.count, slots(s.row, int(own_start[i]), s.start + s.count, page_size))
    plan.own = _batches(own)
    for level in sorted(levels):
        plan.shared.extend(_batches(levels[level]))
    return plan


def plan_whole_rows(offsets: Index) -> AttentionPlan:
    """Rows of which nothing is cached or shared: row i is the step's tokens offsets[i] .. offsets[i + 1], each of which
    lies in the pool at its own place in the step."""
    ends = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    return AttentionPlan(_batches([block for at, end in ends for block in _tiles(at, end - at, np.arange(at, end))]))


def _tiles(first: int, count: int, keys: Index) -> list[Block]:
    """Causal blocks of the queries first .. first + count, which are the last of ``keys``."""
    past = len(keys) - count
    starts = range(0, count, QUERY_TILE)
    tiles = [(at, min(at + QUERY_TILE, count)) for at in starts]
    return [Block(np.arange(first + at, first + end), keys[: past + end], causal=True) for at, end in tiles]


def slots(row: Row, start: int, stop: int, page_size: int) -> Index:
    """Where the K/V of the row's tokens [start, stop) lie in the pool."""
    if page_size == 1:
        return row.pages[start:stop].astype(np.int64)
    at = np.arange(start, stop)
    return row.pages[at // page_size].astype(np.int64) * page_size + at % page_size


def _shared_blocks(
    rows: Sequence[Scheduled], offsets: Index, page_size: int
) -> tuple[dict[int, list[Block]], npt.NDArray[np.int_]]:
    """Blocks by level of the tree, and for each row the token where its own block begins."""
    standing: dict[int, tuple[Node, list[int]]] = {}  # id(node) -> node, rows that have all of it behind them
    for i, s in enumerate(rows):
        node: Node | None = s.row.node
        while node is not None and node.parent is not None:
            if node.end <= s.start:
                standing.setdefault(id(node), (node, []))[1].append(i)
            node = node.parent
    own_start = np.zeros(len(rows), dtype=int)
    levels: dict[int, list[Block]] = {}
    cut: dict[int, tuple[int, int]] = {}  # id(node) -> tokens covered by blocks so far, level
    shared = [(node, members) for node, members in standing.values() if len(members) > 1]
    chained = {id(n.parent) for n, m in shared if n.parent and len(standing.get(id(n.parent), (n, []))[1]) == len(m)}
    for node, members in sorted(shared, key=lambda entry: entry[0].end):
        covered, level = cut.get(id(node.parent), (0, 0))
        if node.end - covered >= MIN_SHARED and id(node) not in chained:
            queries = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in members])
            keys = slots(rows[members[0]].row, covered, node.end, page_size)
            level += 1
            levels.setdefault(level, []).append(Block(queries, keys))
            covered = node.end
            own_start[members] = covered
        cut[id(node)] = (covered, level)
    return levels, own_start


def _batches(blocks: list[Block]) -> list[BlockBatch]:
    """Group blocks of like shape."""
    batches: list[BlockBatch] = []
    group: list[Block] = []
    area = width = depth = 0
    for block in sorted(blocks, key=lambda b: (len(b.queries), len(b.keys))):
        m, n = max(width, len(block.queries)), max(depth, len(block.keys))
        real = area + len(block.queries) * len(block.keys)
        padded = m * n * (len(group) + 1)
        if group and (padded > _PADDING * real + 4096 or padded > _MAX_AREA):
            batches.append(_pad(group))
            group, area, width, depth = [], 0, 0, 0
        group.append(block)
        area += len(block.queries) * len(block.keys)
        width, depth = max(width, len(block.queries)), max(depth, len(block.keys))
    if group:
        batches.append(_pad(group))
    return batches


def _pad(group: list[Block]) -> BlockBatch:
    """Pad with a block's own first entry: what is padded is hidden or thrown away, but is valid memory."""
    m, n = max(len(b.queries) for b in group), max(len(b.keys) for b in group)
    queries = np.empty((len(group), m), dtype=np.int64)
    keys = np.empty((len(group), n), dtype=np.int64)
    counts = np.array([[len(b.queries), len(b.keys)] for b in group])
    for i, block in enumerate(group):
        queries[i, : counts[i, 0]], queries[i, counts[i, 0] :] = block.queries, block.queries[0]
        keys[i, : counts[i, 1]], keys[i, counts[i, 1] :] = block.keys, block.keys[0]
    nq, nk = counts[:, 0, None], counts[:, 1, None]
    valid = None if (nq == m).all() else np.flatnonzero(np.arange(m)[None] < nq)
    hidden = None
    if any(b.causal for b in group) and m > 1:
        last = np.minimum(nk - nq + np.arange(m)[None], nk - 1)  # [R, M]: the last key that each query sees
        hidden = np.arange(n)[None, None] > last[:, :, None]
    elif not (nk == n).all():
        hidden = np.broadcast_to((np.arange(n)[None] >= nk)[:, None], (len(group), m, n))
    return BlockBatch(queries, keys, valid, hidden)
