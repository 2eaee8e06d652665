"""Lays a step's attention out as work items: which queries read which keys, and where partial results go.

Rows with few new tokens (decoding, or a few prompt tokens) that stand on one prefix read it once for all of them
(cascade attention to any depth of the radix tree; FlashInfer, arXiv 2501.01005, section 3); what is left of each row,
and long prompt chunks, are items of their own. Numpy only: no loop over rows, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Wide = npt.NDArray[np.int64]

FIELDS = 8  # of a work item: first, count, lane, key start, key stop, causal, part, single
MOST_PARTS = 16  # partial results of one token
LONG_TILES = (64, 128)
_ALL_KEYS = -1  # causal: every query sees all keys of the item


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the layout depends on.

    group: query heads a kv head. multiprocessors: of the GPU. *_tile: (query, head) rows of a program's tile.
    min_shared: tokens; a shorter common run is cheaper read once per row than merged, which costs a row as much as so
    many reads. min_saved: reads of a key of a kv head; a step that would save fewer, beyond what merging costs, reads
    everything row by row: further kernels cost more.
    split_keys: a row's keys are split among programs down to this many. cascade, splits: off for comparison.
    """

    group: int
    kv_heads: int
    page_size: int
    multiprocessors: int
    own_tile: int = 16
    shared_tile: int = 128
    min_shared: int = 128
    min_saved: int = 1 << 17
    split_keys: int = 256
    cascade: bool = True
    splits: bool = True

    @property
    def programs(self) -> int:
        """Programs that keep the GPU busy: two on each multiprocessor."""
        return 2 * self.multiprocessors


@dataclass(slots=True)
class Members:
    """Rows of a step with few new tokens; they come first in it.

    Row i computes the step's tokens [first[i], first[i] + count[i]), which are positions start[i] and on of its lane.
    ends: [rows, levels]: where the prefixes end that it may share, shallowest first, then 0. All are at most start[i].
    """

    lane: Wide
    first: Wide
    count: Wide
    start: Wide
    ends: Wide


@dataclass(slots=True)
class Layout:
    """Work items [items, FIELDS] by tile; ``long`` has its own.

    order: the tokens that shared items name; the others name them by number. parts: of each token of members, to merge.
    """

    order: Ints
    own: Ints
    shared: Ints
    long: Ints
    parts: Ints
    most_parts: int
    long_tile: int


def lay_out(members: Members, long_rows: Wide, table: Ints, device: Device) -> Layout:
    """The work items of a step.

    long_rows: [rows, 4]: first token, count, lane, start; their tokens follow the members'. table: [lanes, pages].
    """
    own_start = np.zeros(len(members.lane), np.int64)
    parts = np.zeros(len(members.lane), np.int64)
    orders: list[Wide] = []
    shared: list[Wide] = []
    if device.cascade and len(members.lane) > 1:
        for level in range(members.ends.shape[1]):
            at = sum(map(len, orders))
            found = _shared_level(members, level, own_start, parts, at, table, device)
            if found is not None:
                orders.append(found[0])
                shared.append(found[1])
        if _saved(shared, device) * device.kv_heads < device.min_saved:
            orders, shared = [], []
            own_start[:] = parts[:] = 0
    own = _own(members, own_start, parts, device)
    # A tile that chunks do not fill is work for nothing; where other rows must not matter, there is one tile only.
    fills = int(long_rows[:, 1].max(initial=0)) * device.group > LONG_TILES[0]
    long_tile = LONG_TILES[fills or not device.splits]
    per_token = np.repeat(parts, members.count)
    return Layout(
        order=(np.concatenate(orders) if orders else np.empty(0)).astype(np.int32),
        own=own.astype(np.int32),
        shared=(np.concatenate(shared) if shared else np.empty((0, FIELDS))).astype(np.int32),
        long=_long(long_rows, long_tile // device.group).astype(np.int32),
        parts=per_token.astype(np.int32),
        most_parts=int(per_token.max(initial=1)),
        long_tile=long_tile,
    )


def _shared_level(
    members: Members, level: int, own_start: Wide, parts: Wide, base: int, table: Ints, device: Device
) -> tuple[Wide, Wide] | None:
    """One level of shared prefixes: the tokens that read them, group by group, and the items. Updates the rows' state.

    Rows are of one group if the last page of the prefix is the same one (a page stands in one place of the tree), and
    what is left to read of it, and so far as many parts.
    """
    ends = members.ends[:, level]
    rows = np.flatnonzero((ends - own_start >= device.min_shared) & (parts < MOST_PARTS // 2))
    if len(rows) < 2:
        return None
    last_page = table[members.lane[rows], (ends[rows] - 1) // device.page_size].astype(np.int64)
    key = last_page << 32 | own_start[rows] << 4 | parts[rows]
    _, group, sizes = np.unique(key, return_inverse=True, return_counts=True)
    kept = sizes[group] > 1
    rows, group = rows[kept], group[kept]
    if not len(rows):
        return None
    by_group = np.argsort(group, kind="stable")
    rows, group = rows[by_group], group[by_group]
    begins = np.flatnonzero(np.diff(group, prepend=-1))  # of each group, in rows
    counts = members.count[rows]
    queries = np.add.reduceat(counts, begins)
    key_start, key_stop = own_start[rows[begins]], ends[rows[begins]]
    per_item = device.shared_tile // device.group
    tiles = -(-queries // per_item)
    splits = _splits(key_stop - key_start, int(tiles.sum()), device)
    part = parts[rows[begins]]
    items = _cut(
        base + np.cumsum(queries) - queries, queries, per_item, members.lane[rows[begins]], key_start, key_stop, splits,
        part, np.full(len(begins), _ALL_KEYS),
    )  # fmt: skip
    sizes = np.diff(begins, append=len(rows))
    parts[rows] += np.repeat(splits, sizes)
    own_start[rows] = ends[rows]
    order = np.repeat(members.first[rows] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    return order, items


def _saved(shared: list[Wide], device: Device) -> int:
    """Reads of keys that shared items save, less those that merging their results costs."""
    return sum(int(((items[:, 4] - items[:, 3] - device.min_shared) * (items[:, 1] - 1)).sum()) for items in shared)


def _own(members: Members, own_start: Wide, parts: Wide, device: Device) -> Wide:
    """What each row reads alone: keys from own_start up to its own tokens. Updates ``parts``."""
    if not len(members.lane):
        return np.empty((0, FIELDS), np.int64)
    key_stop = members.start + members.count
    per_item = device.own_tile // device.group
    tiles = -(-members.count // per_item)
    splits = np.minimum(_splits(key_stop - own_start, int(tiles.sum()), device), MOST_PARTS - parts)
    causal = np.where(members.count > 1, members.start, _ALL_KEYS)
    splits = np.where(members.count > 1, 1, splits)  # so that each of a row's queries sees a key of each split
    single = (parts == 0) & (splits == 1)
    items = _cut(
        members.first, members.count, per_item, members.lane, own_start, key_stop, splits, parts, causal, single
    )
    parts += splits
    return items


def _long(rows: Wide, per_item: int) -> Wide:
    """Prompt chunks: all keys up to each query, in one part."""
    first, count, lane, start = rows.T
    ones, zeros = np.ones(len(rows), np.int64), np.zeros(len(rows), np.int64)
    items = _cut(first, count, per_item, lane, zeros, start + count, ones, zeros, start, ones.astype(bool))
    # The longest first: what is left at the end is short.
    return items[np.argsort(-items[:, 4], kind="stable")]


def _splits(keys: Wide, programs: int, device: Device) -> Wide:
    """Into how many parts to split each run of keys, so that few rows over long prefixes still fill the GPU."""
    if not device.splits:
        return np.ones(len(keys), np.int64)
    fill = max(1, device.programs // max(1, programs * device.kv_heads))
    return np.clip(-(-keys // device.split_keys), 1, min(fill, MOST_PARTS // 2))


def _cut(
    first: Wide,
    count: Wide,
    per_item: int,
    lane: Wide,
    key_start: Wide,
    key_stop: Wide,
    splits: Wide,
    part: Wide,
    causal: Wide,
    single: npt.NDArray[np.bool_] | None = None,
) -> Wide:
    """Items of at most ``per_item`` queries, each once per split of the keys.

    causal: position of the first query, or _ALL_KEYS. A causal item ends with the last key that its queries see.
    """
    tiles = -(-count // per_item)
    per_row = tiles * splits
    row = np.repeat(np.arange(len(first)), per_row)
    within = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    tile, split = within // splits[row], within % splits[row]
    items = np.empty((len(row), FIELDS), np.int64)
    skipped = tile * per_item
    items[:, 0] = first[row] + skipped
    items[:, 1] = np.minimum(count[row] - skipped, per_item)
    items[:, 2] = lane[row]
    keys = key_stop[row] - key_start[row]
    chunk = -(-keys // splits[row])
    items[:, 3] = key_start[row] + split * chunk
    stop = np.minimum(items[:, 3] + chunk, key_stop[row])
    is_causal = causal[row] != _ALL_KEYS
    items[:, 5] = np.where(is_causal, causal[row] + skipped, _ALL_KEYS)
    items[:, 4] = np.where(is_causal, np.minimum(stop, items[:, 5] + items[:, 1]), stop)
    items[:, 6] = part[row] + split
    items[:, 7] = 0 if single is None else single[row]
    return items
