"""Which of the prefixes that the router knows this engine has evicted: told in batches, off the engine's thread.

The router knows prefixes by hashes of segments (``routing.Block``), the cache by tokens. Where rows of a batch part,
both are at hand: so many segments are so many tokens. Such borders are noted, and found again in what is evicted.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa
import xxhash
from sortedcontainers import SortedDict

from spark_llm.engine.prefix import KEY_BYTES, sort_key
from spark_llm.engine.request import TokenIds
from spark_llm.engine.service.dispatch_groups import SegmentTable
from spark_llm.engine.service.routing import Path

_MOST_BORDERS = 16_384
_MOST_EVICTIONS = 16_384  # not looked at yet; beyond it the oldest are forgotten: the router then expects too much


class Held:
    """Streams ``note`` what they ask, the engine's thread calls ``evicted``, who tells the router calls ``take``."""

    def __init__(self, most_borders: int = _MOST_BORDERS) -> None:
        self._most_borders = most_borders
        self._lock = threading.Lock()
        self._borders: OrderedDict[tuple[int, int], Path] = OrderedDict()  # (tokens, hash of them) -> segments
        self._lengths: SortedDict[int, int] = SortedDict()  # tokens of borders -> how many have so many
        self._evictions: deque[tuple[bytes, int, int]] = deque(maxlen=_MOST_EVICTIONS)

    def note(
        self, system: str | None, batch: pa.RecordBatch, prompts: Sequence[TokenIds], shared: Sequence[int]
    ) -> None:
        """Rows of a REQUEST_SCHEMA batch, their prompts, and how many leading tokens each shares with the next one."""
        table = SegmentTable.of(batch, system)
        before = -1
        for row, depth in enumerate(table.shared.tolist()):
            if depth and depth != before and shared[row]:
                tokens = shared[row]
                key = (tokens, xxhash.xxh3_64_intdigest(sort_key(prompts[row][:tokens])))
                self._add(key, table.path(row, depth))
            before = depth

    def evicted(self, key: bytes, start: int, end: int) -> None:
        """Tokens [start, end) of the prompt with this sort key have left the cache."""
        self._evictions.append((key, start, end))

    def take(self) -> list[int]:
        """Hashes of the blocks that have been evicted since the last call."""
        found: list[int] = []
        while self._evictions:
            key, start, end = self._evictions.popleft()
            with self._lock:
                first, last = self._lengths.bisect_right(start), self._lengths.bisect_right(end)
                for tokens in list(self._lengths.islice(first, last)):
                    border = (tokens, xxhash.xxh3_64_intdigest(key[: KEY_BYTES * tokens]))
                    path = self._borders.get(border)
                    if path is not None:
                        self._remove(border)
                        found += _beyond(path, tokens, start)
        return found

    def _add(self, border: tuple[int, int], path: Path) -> None:
        with self._lock:
            if border not in self._borders:
                self._lengths[border[0]] = self._lengths.get(border[0], 0) + 1
            self._borders[border] = path
            self._borders.move_to_end(border)
            if len(self._borders) > self._most_borders:
                self._remove(next(iter(self._borders)))

    def _remove(self, border: tuple[int, int]) -> None:
        del self._borders[border]
        left = self._lengths[border[0]] - 1
        if left:
            self._lengths[border[0]] = left
        else:
            del self._lengths[border[0]]


def _beyond(path: Path, tokens: int, start: int) -> list[int]:
    """Hashes of the blocks that end beyond ``start``, of a path of ``tokens`` tokens in truth. The last one does."""
    ends = list(accumulate(block.tokens for block in path))
    scaled = [end * tokens / max(1, ends[-1]) for end in ends]
    return [block.hash for block in path[min(bisect_right(scaled, start), len(path) - 1) :]]
