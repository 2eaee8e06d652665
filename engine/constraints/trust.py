"""How often a grammar refuses what a model would say by itself: whether its answers are sampled without masks.

A greedy token that is sampled without a mask, and that the grammar allows, is the one that the mask would have left as
the greatest; one that is refused costs its row two computed tokens and a mask. Most models keep to the form of an
answer by themselves once it has begun; where one does not, masks are cheaper.
"""

from __future__ import annotations

_MOST_REFUSED = 0.2  # of the tokens that were sampled without a mask
_WINDOW = 512  # of those, that the share is of; older ones fade
_PAUSE = 4096  # tokens with masks before the next attempt


class Trust:
    """Of one grammar, shared by its rows. guesses: tokens are sampled without masks, and looked at afterwards."""

    __slots__ = ("_refused", "_tokens", "guesses")

    def __init__(self) -> None:
        self.guesses = True
        self._tokens = self._refused = 0

    def guessed(self, *, refused: bool) -> None:
        """A token was sampled without a mask."""
        if not self.guesses:
            return  # it was on its way when the others were refused
        self._tokens += 1
        self._refused += refused
        if self._refused > _MOST_REFUSED * _WINDOW:
            self.guesses, self._tokens = False, 0
        elif self._tokens >= _WINDOW:
            self._tokens //= 2
            self._refused //= 2

    def masked(self) -> None:
        """A token was sampled with a mask."""
        if self.guesses:
            return
        self._tokens += 1
        if self._tokens >= _PAUSE:
            self.guesses, self._tokens, self._refused = True, 0, 0
