"""Ranges of rows in prompt order: equal rows together, work shared out, prefixes kept, slots that Spark agrees with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spark_llm.optimizer.reorder.ranges import choose_cuts, range_of, slots

keys = arrays.arrays(np.uint64, st.tuples(st.integers(0, 60), st.integers(1, 3)), elements=st.integers(0, 4))


def work_of(key: np.ndarray, lengths: np.ndarray, ranges: np.ndarray, count: int) -> list[float]:
    """Tokens that a cache a range computes, rows in key order."""
    order = np.lexsort((*key.T[::-1], ranges))
    work, before = [0.0] * count, [()] * count
    for row in order:
        cells, number = tuple(key[row]), int(ranges[row])
        shared = 0
        while shared < len(before[number]) and before[number][shared] == cells[shared]:
            shared += 1
        work[number] += float(lengths[row, shared:].sum())
        before[number] = cells
    return work


@given(keys, st.integers(1, 9))
@settings(deadline=None)
def test_ranges_follow_the_keys_and_equal_rows_stay_together(key: np.ndarray, count: int) -> None:
    ranges = range_of(key, choose_cuts(key, np.ones(key.shape), count))
    assert ((ranges >= 0) & (ranges < count)).all()
    rows = sorted(zip(map(tuple, key.tolist()), ranges.tolist(), strict=True))
    assert [number for _, number in rows] == sorted(number for _, number in rows)
    assert len(set(rows)) == len({cells for cells, _ in rows})


@pytest.mark.parametrize("count", [2, 7, 32])
def test_work_is_shared_out_and_little_is_computed_twice(count: int) -> None:
    random = np.random.default_rng(0)
    group = random.zipf(1.5, 8000) % 300
    key = np.stack([group // 30, group, random.integers(0, 1 << 60, 8000)], axis=1).astype(np.uint64)
    lengths = np.tile([5.0, 200.0, 20.0], (8000, 1))
    work = work_of(key, lengths, range_of(key, choose_cuts(key, lengths, count)), count)
    whole = work_of(key, lengths, np.zeros(8000, np.int64), 1)[0]
    assert sum(work) - whole <= count * 225
    assert max(work) <= 2 * whole / count + 225


def test_cuts_stand_between_groups_where_they_can() -> None:
    group = np.repeat(np.arange(8), 10)
    key = np.stack([group, np.arange(80)], axis=1).astype(np.uint64)
    ranges = range_of(key, choose_cuts(key, np.tile([100.0, 1.0], (80, 1)), 4))
    assert ranges.tolist() == np.repeat(np.arange(4), 20).tolist()


def test_a_sample_cuts_the_whole_table() -> None:
    random = np.random.default_rng(1)
    key = random.integers(0, 1 << 62, (50_000, 2)).astype(np.uint64)
    cuts = choose_cuts(key[:2000], np.ones((2000, 2)), 10)
    sizes = np.bincount(range_of(key, cuts), minlength=10)
    assert sizes.min() > 2500
    assert sizes.max() < 7500


def test_no_rows_one_range_and_rows_all_alike() -> None:
    for key in (np.zeros((0, 2), np.uint64), np.zeros((9, 2), np.uint64)):
        assert choose_cuts(key, np.ones(key.shape), 5) == b""
        assert range_of(key, b"").tolist() == [0] * len(key)


@pytest.mark.parametrize("count", [1, 2, 3, 200, 1009])
def test_there_is_a_slot_for_each_partition(count: int) -> None:
    found = slots(count)
    assert len(np.unique(found)) == count
    assert (found == slots(count)).all()
