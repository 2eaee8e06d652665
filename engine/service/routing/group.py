"""What is dispatched: rows of one client that share a prefix. Prefixes are known by hashes, not by their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import xxhash

OUTPUT_WEIGHT = 2.0  # service of an answer's token; that of a prompt's token that is computed is 1 (ALGORITHMS.md 3)


class Block(NamedTuple):
    """A piece of a prefix. hash: 64 bits of all the text up to its end, so that it names the whole prefix.

    tokens: of this piece alone, as estimated.
    """

    hash: int
    tokens: int


Path = tuple[Block, ...]  # a prefix, from the prompt's first token on


class PrefixGroup(msgspec.Struct, frozen=True, kw_only=True):
    """``rows`` rows whose prompts begin with ``path``.

    client: who is charged, at the level that fairness counts. weight: its share against others'.
    own_tokens: of a row beyond the path, output_tokens: of its answer; both estimated means.
    """

    client: str
    path: Path
    rows: int
    own_tokens: float
    output_tokens: float
    weight: float = 1.0

    @property
    def row_cost(self) -> float:
        """Service of a row whose path is cached."""
        return self.own_tokens + OUTPUT_WEIGHT * self.output_tokens


def path_of(segments: Sequence[str], tokens: Sequence[int], start: int = 0) -> Path:
    """The path of a prompt that is ``segments`` joined, which are about ``tokens`` tokens each.

    start: a hash of what goes before and is no segment: model, system message, template.
    """
    path = []
    for segment, count in zip(segments, tokens, strict=True):
        start = xxhash.xxh3_64_intdigest(segment.encode("utf-8", "surrogatepass"), start)
        path.append(Block(start, count))
    return tuple(path)


class Run(NamedTuple):
    """Adjacent rows [start, end) of a window, which share ``path``."""

    start: int
    end: int
    path: Path


def runs_of(paths: Sequence[Path]) -> list[Run]:
    """Cut a window's rows, whose whole paths these are, in their order, into runs that share more than all do.

    Where no two neighbours share more than all rows do, the window is one run.
    """
    if not paths:
        return []
    shared = [_shared_blocks(a, b) for a, b in pairwise(paths)]
    least = min(shared, default=len(paths[0]))
    if all(count == least for count in shared):
        return [Run(0, len(paths), paths[0][:least])]
    cuts = [0, *(at + 1 for at, count in enumerate(shared) if count == least), len(paths)]
    return [
        Run(start, end, paths[start][: min(shared[start : end - 1], default=len(paths[start]))])
        for start, end in pairwise(cuts)
    ]


def _shared_blocks(a: Path, b: Path) -> int:
    count = 0
    for mine, other in zip(a, b, strict=False):
        if mine.hash != other.hash:
            break
        count += 1
    return count
