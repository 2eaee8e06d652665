"""The work items of a step cover every (query, key) pair exactly once, whatever rows share."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.engine.cuda.attention_plan import MOST_PARTS, Device, Layout, Members, lay_out

WIDTH = 4096


def device(**options: object) -> Device:
    return Device(**{"group": 4, "kv_heads": 2, "page_size": 1, "multiprocessors": 8, "min_saved": 0, **options})  # type: ignore[arg-type]


def pairs(layout: Layout, lanes: np.ndarray, positions: np.ndarray) -> Counter[tuple[int, int, int]]:
    """(token, key position) -> how often it is read, the parts in which each token's results lie checked on the way."""
    read: Counter[tuple[int, int, int]] = Counter()
    seen: dict[int, list[int]] = {}
    for items in (layout.own, layout.shared, layout.long):
        for first, count, _, start, stop, causal, part, single in items.tolist():
            assert count > 0
            named = layout.order[first : first + count].tolist() if items is layout.shared else None
            for i, token in enumerate(named or range(first, first + count)):
                last = stop if causal < 0 else min(stop, causal + i + 1)
                assert last > start, "a query without a key"
                seen.setdefault(token, []).append(-1 if single else part)
                for key in range(start, last):
                    read[token, key, 0] += 1
    for token, found in seen.items():
        expected = layout.parts[token] if token < len(layout.parts) else 1
        assert found == [-1] if expected == 1 else sorted(found) == list(range(expected)), (token, found, expected)
    assert len(seen) == len(lanes), "a token without a result"
    return read


def causal_pairs(positions: np.ndarray) -> Counter[tuple[int, int, int]]:
    return Counter({(token, key, 0): 1 for token, at in enumerate(positions.tolist()) for key in range(at + 1)})


@st.composite
def steps(draw: st.DrawFn) -> tuple[Members, np.ndarray, np.ndarray, int]:
    """Rows below a random tree of prefixes: a page number says which prefix a position belongs to."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    cuts = sorted(draw(st.lists(st.integers(1, 12), min_size=0, max_size=3, unique=True)))
    cuts = [cut * 16 for cut in cuts]
    rows = draw(st.integers(1, 12))
    table = np.full((rows, WIDTH // page_size), 0, np.int32)
    ends = np.zeros((rows, 4), np.int64)
    lane, count, start = np.arange(rows), np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    pages: dict[tuple[object, ...], int] = {}
    for row in range(rows):
        depth = draw(st.integers(0, len(cuts)))
        path = tuple(draw(st.integers(0, 1)) for _ in range(depth))
        for page in range(WIDTH // page_size if depth else 0):
            level = sum(page * page_size >= cut for cut in cuts)
            owner = (path[: level + 1], page) if level < depth else (row, page, "own")
            table[row, page] = pages.setdefault(owner, len(pages))
        if not depth:
            for page in range(WIDTH // page_size):
                table[row, page] = pages.setdefault((row, page, "own"), len(pages))
        known = draw(st.integers(0, depth))  # a row may not know of every prefix that it shares
        ends[row, :known] = sorted(draw(st.permutations(cuts[:depth])))[:known]
        start[row] = (cuts[depth - 1] if depth else 0) + draw(st.integers(0, 300))
        count[row] = draw(st.sampled_from([1, 1, 2, 5, 8]))
    first = np.cumsum(count) - count
    members = Members(lane, first, count, start, ends)
    return members, table, np.empty((0, 4), np.int64), page_size


@settings(max_examples=60, deadline=None)
@given(steps(), st.booleans(), st.sampled_from([1, 3, 4, 8]), st.sampled_from([1, 32]))
def test_every_pair_once(
    step: tuple[Members, np.ndarray, np.ndarray, int], cascade: bool, group: int, min_shared: int
) -> None:
    members, table, long_rows, page_size = step
    options = device(cascade=cascade, group=group, min_shared=min_shared, page_size=page_size, split_keys=64)
    positions = np.concatenate([np.arange(s, s + c) for s, c in zip(members.start, members.count, strict=True)])
    lanes = np.repeat(members.lane, members.count)
    layout = lay_out(members, long_rows, table, options)
    assert pairs(layout, lanes, positions) == causal_pairs(positions)
    assert layout.most_parts <= MOST_PARTS


def rows_below_one_prefix(rows: int, prefix: int, own: int) -> tuple[Members, np.ndarray]:
    table = np.arange(rows * (prefix + own), dtype=np.int32).reshape(rows, prefix + own)
    table[:, :prefix] = np.arange(prefix)
    ends = np.zeros((rows, 4), np.int64)
    ends[:, 0] = prefix
    one = np.ones(rows, np.int64)
    return Members(np.arange(rows), np.arange(rows), one, one * (prefix + own - 1), ends), table


def keys_read(layout: Layout) -> int:
    return sum(int((items[:, 4] - items[:, 3]).sum()) for items in (layout.own, layout.shared, layout.long))


def test_a_prefix_is_read_once_per_tile_not_once_per_row() -> None:
    members, table = rows_below_one_prefix(64, 2048, 32)
    none = np.empty((0, 4), np.int64)
    shared = lay_out(members, none, table, device())
    plain = lay_out(members, none, table, device(cascade=False))
    assert keys_read(plain) == 64 * 2080
    assert keys_read(shared) == 2 * 2048 + 64 * 32  # 32 queries of 4 heads fill a tile of 128


def test_a_step_that_would_save_little_reads_row_by_row() -> None:
    members, table = rows_below_one_prefix(4, 256, 32)
    none = np.empty((0, 4), np.int64)
    plain = lay_out(members, none, table, device(cascade=False))
    saved = 3 * (256 - 128) * 2  # reads of the prefix beyond the first, less merging, of 2 kv heads
    below, enough = (lay_out(members, none, table, device(min_saved=least)) for least in (saved + 1, saved))
    assert not len(below.shared)
    assert np.array_equal(below.own, plain.own)
    assert below.parts.tolist() == plain.parts.tolist()
    assert len(enough.shared)


def test_few_rows_over_many_keys_fill_the_gpu() -> None:
    members, table = rows_below_one_prefix(1, 4096, 32)
    layout = lay_out(members, np.empty((0, 4), np.int64), table, device())
    assert len(layout.own) == 8  # 16 programs on 8 multiprocessors, 2 kv heads each
    assert layout.parts.tolist() == [8]


def test_long_chunks_are_cut_into_tiles_and_see_what_lies_before_them() -> None:
    members = Members(*(np.empty(0, np.int64) for _ in range(4)), ends=np.empty((0, 4), np.int64))
    long_rows = np.array([[0, 70, 0, 100], [70, 200, 1, 0]])
    layout = lay_out(members, long_rows, np.zeros((2, WIDTH), np.int32), device())
    positions = np.concatenate([np.arange(100, 170), np.arange(200)])
    lanes = np.repeat([0, 1], [70, 200])
    assert pairs(layout, lanes, positions) == causal_pairs(positions)
    assert layout.long[:, 1].max() == 32
    assert (np.diff(layout.long[:, 4]) <= 0).all(), "the longest go first"
