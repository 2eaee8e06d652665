"""Rows in prompt order cut into ranges of equal work: which range a row is in, and how a hash exchange gets it there.

Range partitioning keeps prefixes together at every depth, where hashing a leading cell tears the tree apart below it.
Spark's own would run the rows' plan once more to learn the ranges (CONTRACTS.md 7), and twice what stands below; these
come from the sample that the order table comes from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spark_llm.optimizer.reorder.hashing import SEED, Hashes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLOT_BYTES = 4
_SLACK = 0.25  # of a range's work: how far a cut may move to where rows share little


def choose_cuts(key: Hashes, lengths: Floats, count: int) -> bytes:
    """Cuts between ``count`` ranges of about equal work, from sampled rows: keys, joined, in ascending order.

    key: uint64 [rows, positions], the rows' cells in the order of their prompts (``Placement.key``). lengths: tokens of
    those cells. A range begins with the rows of its cut's key, so rows with equal keys are in one range; there may be
    fewer ranges where rows have too few keys. Work is what a prefix cache does not find; a cut moves to where the rows
    on its two sides share least.
    """
    if count < 2 or not len(key) or not key.shape[1]:
        return b""
    order = np.lexsort(key.T[::-1])
    key, lengths = key[order], lengths[order]
    same = np.logical_and.accumulate(key[1:] == key[:-1], axis=1)
    shared = np.concatenate([[0.0], (lengths[1:] * same).sum(axis=1)])
    done = np.cumsum(lengths.sum(axis=1) - shared)
    may_cut = np.concatenate([[False], ~same[:, -1]])
    places = np.flatnonzero(may_cut)
    before = done[places - 1]  # work on the left of each place
    chosen: set[int] = set()
    each = done[-1] / count
    for number in range(1, count):
        low, high = np.searchsorted(before, [(number - _SLACK) * each, (number + _SLACK) * each])
        if low == high:  # no place is near: the next one
            high = min(low + 1, len(places))
        if low < high:
            near = places[low:high]
            away = np.abs(before[low:high] - number * each)
            chosen.add(int(near[np.lexsort((away, shared[near]))[0]]))
    return key[sorted(chosen)].astype(">u8").tobytes()


def range_of(key: Hashes, cuts: bytes) -> Ints:
    """The range, int64 [rows], that each row's key is in."""
    width = 8 * key.shape[1]
    if not cuts or not width:
        return np.zeros(len(key), np.int64)
    # Fixed width, so that numpy compares all bytes though it takes trailing zeros for padding.
    borders = np.frombuffer(cuts, f"S{width}")
    rows = np.ascontiguousarray(key.astype(">u8")).view(f"S{width}").reshape(-1)
    return np.searchsorted(borders, rows, side="right")


def slots(count: int) -> npt.NDArray[np.uint32]:
    """For each of ``count`` partitions four bytes, as a little-endian word, that Spark's hash exchange sends there.

    HashPartitioning takes Murmur3 (x86, 32 bits, seed 42) of the exchange's expressions modulo the partitions.
    """
    found = np.zeros(count, np.uint32)
    missing = np.ones(count, np.bool_)
    start = 0
    while missing.any():
        words = np.arange(start, start + 4 * count + 16, dtype=np.uint32)
        partitions = _murmur3(words).view(np.int32).astype(np.int64) % count
        values, first = np.unique(partitions, return_index=True)
        new = missing[values]
        found[values[new]] = words[first[new]]
        missing[values] = False
        start += len(words)
    return found


def _murmur3(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Murmur3_x86_32 of single words of four bytes."""

    def rotated(value: npt.NDArray[np.uint32], by: int) -> npt.NDArray[np.uint32]:
        return (value << np.uint32(by)) | (value >> np.uint32(32 - by))

    mixed = rotated(words * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    state = rotated(np.uint32(SEED) ^ mixed, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    state ^= np.uint32(SLOT_BYTES)
    state = (state ^ (state >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    state = (state ^ (state >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return state ^ (state >> np.uint32(16))
