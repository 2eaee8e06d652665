"""Which engine is taken to hold which prefix: the global prefix tree of D2LPM, over hashes.

The hash of a block names the whole prefix that ends with it, so the tree needs no edges: a prefix is held as far as
each of its blocks is. What engines evict is told later, or never: a belief may be wrong, and costs a miss then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from spark_llm.engine.service.routing.fleet import Flags, Floats
from spark_llm.engine.service.routing.group import Path


class Holdings:
    """Sets of engines, as bits of an int, by block. Blocks used longest ago are forgotten beyond ``max_blocks``."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self._engines: OrderedDict[int, int] = OrderedDict()  # hash -> engines; least recently used first

    def __len__(self) -> int:
        return len(self._engines)

    def missing(self, path: Path, engines: int, count: int) -> Floats:
        """For each of the engines 0 .. count - 1 how many tokens of ``path`` it has to compute.

        engines: bits of those that are there; the others get the whole path. O(path + engines).
        """
        total = sum(tokens for _, tokens in path)
        missing = np.full(count, float(total))
        held, depth = engines, 0
        for block in path:
            held &= self._engines.get(block.hash, 0)
            if not held:
                break
            depth += block.tokens
            missing[_flags(held, count)] = total - depth
        return missing

    def add(self, path: Path, engine: int) -> None:
        """``engine`` is about to compute the path. Touches it: children before parents, which so outlive them."""
        bit = 1 << engine
        for block in reversed(path):
            self._engines[block.hash] = self._engines.get(block.hash, 0) | bit
            self._engines.move_to_end(block.hash)
        while len(self._engines) > self.max_blocks:
            self._engines.popitem(last=False)

    def remove(self, hashes: Iterable[int], engine: int) -> None:
        """``engine`` has evicted the prefixes that these hashes name; unknown ones are ignored."""
        for hash_ in hashes:
            left = self._engines.get(hash_, 0) & ~(1 << engine)
            if left:
                self._engines[hash_] = left
            else:
                self._engines.pop(hash_, None)

    def forget(self, engine: int) -> None:
        """The engine is gone, and with it all that it held. O(blocks)."""
        self.remove([hash_ for hash_, engines in self._engines.items() if engines >> engine & 1], engine)


@lru_cache(4096)
def _flags(mask: int, count: int) -> Flags:
    """The lowest ``count`` bits, one by one."""
    octets = np.frombuffer(mask.to_bytes(-(-count // 8), "little"), np.uint8)
    return np.unpackbits(octets, count=count, bitorder="little").view(np.bool_)
