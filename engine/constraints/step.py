"""What the constrained rows of a step may answer: lists of tokens, or masks that other threads make meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spark_llm.engine.constraints.matcher import Ints, Matcher

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_MASK_BITS = 32  # of a mask's word
State = tuple[int, bytes]


@dataclass(frozen=True, slots=True, eq=False)
class StepChoices:
    """Of a plan's answers, in its order, those that are constrained.

    listed: int32 [m], which answers have candidates: int32 [m, most] (most at least 1), ascending, then -1.
    masked: int32 [n], which answers have a mask; maskers: what makes it. states: of these, see Matcher.
    """

    listed: Ints
    candidates: Ints
    masked: Ints
    maskers: tuple[LLMatcher, ...]
    states: tuple[State | None, ...]

    def only_lists(self, answers: int) -> bool:
        """Whether all ``answers`` of the step have candidates."""
        return len(self.listed) == answers


def choices_of(matchers: Sequence[Matcher | None]) -> StepChoices | None:
    """matchers: of a plan's answers, None for free text; None if all are free."""
    listed: list[int] = []
    lists: list[Ints] = []
    masked: list[int] = []
    maskers: list[LLMatcher] = []
    states: list[State | None] = []
    for place, matcher in enumerate(matchers):
        if matcher is None:
            continue
        candidates, masker = matcher.candidates, matcher.masker
        if candidates is not None:
            listed.append(place)
            lists.append(candidates)
        elif masker is not None:
            masked.append(place)
            maskers.append(masker)
            states.append(matcher.state)
    if not listed and not masked:
        return None
    table = np.full((len(lists), max(map(len, lists), default=1)), -1, np.int32)
    for row, candidates in zip(table, lists, strict=True):
        row[: len(candidates)] = candidates
    return StepChoices(np.array(listed, np.int32), table, np.array(masked, np.int32), tuple(maskers), tuple(states))


def mask_words(vocab_size: int) -> int:
    """int32 of a mask: bit ``token % 32`` of word ``token // 32`` is 1 where the token may come next."""
    return -(-vocab_size // _MASK_BITS)


class Masks:
    """Masks on their way: ``wait`` for them."""

    def __init__(self, work: Future[None] | None) -> None:
        self._work = work

    def wait(self) -> None:
        """Returns when they are there."""
        if self._work is not None:
            self._work.result()


@contextmanager
def masking(choices: StepChoices | None, out: Ints | None) -> Iterator[Masks]:
    """Makes the step's masks in other threads while the body runs the model. out: int32 [n, words], contiguous.

    Does not leave before they are made: the rows' matchers are nobody else's until then.
    """
    work = None
    if choices is not None and choices.maskers and out is not None:
        work = _thread().submit(_make, choices, out)
    masks = Masks(work)
    try:
        yield masks
    finally:
        masks.wait()


def _make(choices: StepChoices, out: Ints) -> None:
    """One mask for all rows of one state: the first tokens of answers are the same for many."""
    made: dict[State, int] = {}
    pairs: list[tuple[LLMatcher, int]] = []
    copies: list[tuple[int, int]] = []
    for row, (masker, state) in enumerate(zip(choices.maskers, choices.states, strict=True)):
        source = row if state is None else made.setdefault(state, row)
        if source == row:
            pairs.append((masker, row))
        else:
            copies.append((row, source))
    _executor().unsafe_compute_mask_ptr(pairs, out.ctypes.data, out.shape[1] * out.itemsize, len(out))
    if copies:
        rows, sources = zip(*copies, strict=True)
        out[list(rows)] = out[list(sources)]


@functools.cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "masks")
