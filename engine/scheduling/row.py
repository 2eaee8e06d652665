"""A row on its way through the engine: the three counters and the pages it stands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spark_llm.engine.cache.pool import Pages
from spark_llm.engine.cache.radix import Node
from spark_llm.engine.prefix import sort_key
from spark_llm.engine.request import Completion, FinishReason, Request, TokenIds


class RowState(NamedTuple):
    """What planning changes of a row."""

    num_computed: int
    num_pages: int
    tree_pages: int
    node: Node
    detached: bool
    high_water: int
    cached: int
    computed: int
    recomputed: int


class Row:
    """State of one Request.

    ::

        tokens    | prompt ......................... | answer so far |
        computed  | num_computed: K/V is there, or will be once the planned step ran |
        pages     | tree_pages: the prefix index owns them | private to this row |

    ``num_tokens - num_computed`` tokens must be computed before the next token can be sampled; prefix reuse,
    chunked prefill, decode and preemption are all this one difference.
    """

    __slots__ = (
        "attempts",
        "cached",
        "computed",
        "detached",
        "high_water",
        "key",
        "node",
        "num_computed",
        "num_pages",
        "num_prompt",
        "num_tokens",
        "output",
        "pages",
        "recomputed",
        "request",
        "sequence",
        "tokens",
        "tree_pages",
    )

    def __init__(self, request: Request, sequence: int, root: Node, page_size: int) -> None:
        longest = len(request.prompt) + request.params.max_tokens
        self.request = request
        self.sequence = sequence  # arrival order
        self.tokens: TokenIds = np.empty(longest, dtype=np.int32)
        self.num_prompt = self.num_tokens = len(request.prompt)
        self.tokens[: self.num_tokens] = request.prompt
        self.key = sort_key(request.prompt)
        self.output: list[int] = []
        self.pages: Pages = np.empty(-(-longest // page_size), dtype=np.int32)
        self.num_computed = self.num_pages = self.tree_pages = 0
        self.node = root
        self.detached = not request.reuse  # True: its further pages stay private
        self.high_water = 0  # tokens that were computed or matched at least once
        self.cached = self.computed = self.recomputed = 0  # for the report; see Completion
        self.attempts = 0  # failed steps

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next token can be sampled."""
        return self.num_tokens - self.num_computed

    def count_matched(self, start: int, stop: int) -> None:
        """Account for the tokens [start, stop) found in the cache."""
        self.cached += max(0, min(stop, self.num_prompt) - max(start, self.high_water))
        self.high_water = max(self.high_water, stop)

    def count_computed(self, start: int, stop: int) -> None:
        """Account for the tokens [start, stop) that a step computes."""
        self.recomputed += max(0, min(stop, self.high_water) - start)
        self.computed += max(0, min(stop, self.num_prompt) - max(start, self.high_water))
        self.high_water = max(self.high_water, stop)

    def state(self) -> RowState:
        """What ``restore`` needs."""
        return RowState(*(getattr(self, name) for name in RowState._fields))

    def restore(self, state: RowState) -> None:
        """Be as when ``state`` was taken; locks and pages are the caller's business."""
        for name, value in zip(RowState._fields, state, strict=True):
            setattr(self, name, value)

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
        self.output.append(token)

    def completion(self, reason: FinishReason, error: tuple[str, dict[str, str]] | None = None) -> Completion:
        """The row's answer as it stands."""
        return Completion(
            id=self.request.id,
            output=self.output,
            finish_reason=reason,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached,
            computed_tokens=self.computed,
            recomputed_tokens=self.recomputed,
            instruction_tokens=self.request.instruction_tokens,
            error=error,
        )


@dataclass(slots=True)
class Scheduled:
    """A row's share of a step: it computes tokens [start, start + count).

    ``before``: the row as it was before planning, for rollback. ``admitted``: it was waiting.
    """

    row: Row
    start: int
    count: int
    before: RowState
    admitted: bool

    @property
    def samples(self) -> bool:
        """Whether the step yields the row's next token."""
        return self.start + self.count == self.row.num_tokens
