"""A row on its way through the engine: its counters, and where in the prefix index it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spark_llm.engine.cache.pool import Pages
from spark_llm.engine.cache.radix import Node
from spark_llm.engine.prefix import sort_key
from spark_llm.engine.request import Completion, FinishReason, Request, TokenIds

if TYPE_CHECKING:
    from spark_llm.engine.constraints.matcher import Matcher
    from spark_llm.engine.scheduling.accounts import QueryAccount
    from spark_llm.engine.scheduling.lanes import Lanes


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

    A running row has a lane (-1: it waits). While it decodes, its lane holds ``num_tokens``, ``num_computed``,
    ``num_pages`` and the answer, and what stands here is of when it began to (see Lanes.refresh).
    """

    __slots__ = (
        "account",
        "attempts",
        "cached",
        "computed",
        "detached",
        "doubt",
        "doubted",
        "high_water",
        "key",
        "lane",
        "lanes",
        "limit",
        "lost",
        "matcher",
        "node",
        "num_computed",
        "num_pages",
        "num_prompt",
        "num_tokens",
        "output",
        "recomputed",
        "request",
        "sequence",
        "tokens",
        "tree_pages",
        "turn",
    )

    def __init__(self, request: Request, sequence: int, root: Node, account: QueryAccount | None = None) -> None:
        self.request = request
        self.account = account  # whom it is charged to
        self.sequence = sequence  # arrival order
        self.lane = -1
        self.lanes: Lanes | None = None
        self.turn = 0  # order of admission
        self.tokens: TokenIds = request.prompt
        self.num_prompt = self.num_tokens = len(request.prompt)
        self.limit = self.num_prompt + request.params.max_tokens  # tokens when it is done
        self.key = sort_key(request.prompt)
        self.output: list[int] = []
        self.num_computed = self.num_pages = self.tree_pages = 0
        self.node = root
        self.detached = not request.reuse  # True: its further pages stay private
        self.high_water = 0  # tokens that were computed or matched at least once
        self.cached = self.computed = self.recomputed = 0  # for the report; see Completion
        self.lost = 0  # tokens that failed steps computed
        self.attempts = 0  # failed steps
        self.matcher: Matcher | None = None  # of a constrained row, once it samples
        self.doubted = 0  # tokens that get masks, as one was refused
        self.doubt = 0  # so many got one the last time, if all guesses since were refused
        if request.constraint is not None:
            self.learn(list(request.constraint.forced))

    @property
    def pages(self) -> Pages:
        """The page numbers of a running row, a view; the first ``num_pages`` count."""
        assert self.lanes is not None
        pages: Pages = self.lanes.table[self.lane]
        return pages

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next token can be sampled; not while the row decodes."""
        return self.num_tokens - self.num_computed

    @property
    def answered(self) -> int:
        """How many tokens of the answer are known."""
        if self.lanes is None:
            return len(self.output)
        return int(self.lanes.known[self.lane]) - self.num_prompt

    def learn(self, output: list[int]) -> None:
        """Take over the answer as far as it is known."""
        self.output = output
        if len(output) != self.num_tokens - self.num_prompt:
            self.num_tokens = self.num_prompt + len(output)
            self.tokens = np.concatenate([self.request.prompt, np.array(output, np.int32)])

    def match(self) -> Matcher | None:
        """The matcher of a constrained row, which has taken its answer as far as it is known; None for free text."""
        if self.matcher is None and self.request.constraint is not None:
            self.matcher = self.request.constraint.start(self.output)
        return self.matcher

    def may_guess(self) -> bool:
        """Whether the row's next token may be sampled without a mask, and refused afterwards.

        Not so the first one after the prompt: the prompt's pages may be others', too, and are not written twice.
        """
        constraint = self.request.constraint
        if constraint is None or constraint.trust is None or self.doubted or not self.output:
            return False
        return constraint.trust.guesses and self.request.params.temperature <= 0

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
        return RowState(
            self.num_computed,
            self.num_pages,
            self.tree_pages,
            self.node,
            self.detached,
            self.high_water,
            self.cached,
            self.computed,
            self.recomputed,
        )

    def restore(self, state: RowState) -> None:
        """Be as when ``state`` was taken; locks and pages are the caller's business."""
        (
            self.num_computed,
            self.num_pages,
            self.tree_pages,
            self.node,
            self.detached,
            self.high_water,
            self.cached,
            self.computed,
            self.recomputed,
        ) = state

    def completion(self, reason: FinishReason, error: tuple[str, dict[str, str]] | None = None) -> Completion:
        """The row's answer as it stands."""
        matcher = self.matcher
        return Completion(
            id=self.request.id,
            output=self.output,
            finish_reason=reason,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached,
            computed_tokens=self.computed,
            recomputed_tokens=self.recomputed + self.lost,
            instruction_tokens=self.request.instruction_tokens,
            error=error,
            text=None if matcher is None or error is not None else matcher.text,
            confidence=None if matcher is None or error is not None else matcher.confidence,
        )


@dataclass(slots=True)
class Scheduled:
    """A row's share of a step: it computes tokens [start, start + count).

    samples: whether the step yields the row's next token. lane, generation: which lane it had, and the lane's
    generation, by which to know whether the row is still there. before: the row as it was before planning, for
    rollback; None if it decodes. admitted: it was waiting.
    first, again: of its tokens, those of the prompt that are computed for the first time, and those that had been
    computed before. charge: what its client pays for the prompt (see charging.py).
    """

    row: Row
    start: int
    count: int
    samples: bool
    lane: int
    generation: int
    before: RowState | None = None
    admitted: bool = False
    first: int = 0
    again: int = 0
    charge: int = 0
