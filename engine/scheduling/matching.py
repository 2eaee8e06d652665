"""What sampled tokens mean for constrained rows: allowed or not, what must follow, and whether an answer is whole.

Where steps are in flight, a greedy row is sampled as if it were free, and planned ahead as free rows are. Its matcher
looks at each token when it comes: one that is allowed is the one that a mask would have left as the greatest. Where it
is refused, the row goes back and computes its last token again, for a sample with a mask; what was planned upon the
refused token counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spark_llm.engine.scheduling.lanes import Flags, Floats, Ints, Lanes
from spark_llm.engine.scheduling.row import Row

# Masks in a row after a token was refused: twice as many each time that the next token without one is refused as well,
# as near the end of a string that may not be longer.
_MOST_DOUBT = 16


@dataclass(slots=True)
class Matched:
    """Of the tokens of a step: refused, their places. whole: lanes of rows whose answer is. forced: what must follow.

    back: rows that compute known tokens next, those of ``forced`` like a prompt's.
    """

    refused: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    forced: list[tuple[Row, list[int]]] = field(default_factory=list)
    back: list[Row] = field(default_factory=list)


class Matching:
    """Feeds the matchers. forced_tokens: of answers, that no step had to sample. refused_tokens: sampled in vain."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.forced_tokens = self.refused_tokens = 0

    def take(self, at: Ints, tokens: Ints, log_probs: Floats | None, guessed: Flags | None) -> Matched:
        """Let the matchers of constrained rows take their tokens; the rows whose tokens are refused go back.

        Answers get theirs afterwards, before ``follow``. guessed: which tokens were sampled without a mask.
        """
        lanes, found = self.lanes, Matched()
        places = np.flatnonzero(lanes.constrained[at])
        own = at[places]
        given = [0.0] * len(own) if log_probs is None else log_probs[places].tolist()
        guesses = [False] * len(own) if guessed is None else guessed[places].tolist()
        taken = zip(places.tolist(), own.tolist(), tokens[places].tolist(), given, guesses, strict=True)
        rows, whole, forced = lanes.rows, found.whole, found.forced
        waits: list[bool] = []
        for place, lane, token, log_prob, guess in taken:  # some 500 rows a step: no call that can be spared
            row = rows[lane]
            assert row is not None
            matcher, constraint = row.matcher, row.request.constraint
            assert matcher is not None
            assert constraint is not None
            trust = constraint.trust
            following: list[int] | None
            if guess:
                assert trust is not None
                following = matcher.offer(token)
                trust.guessed(refused=following is None)
                if following is None:
                    found.refused.append(place)
                    waits.append(True)
                    continue
                row.doubt = 0
            else:
                following = matcher.take(token, log_prob)
                row.doubted = max(0, row.doubted - 1)
                if trust is not None:
                    trust.masked()
            waits.append(trust is None or not trust.guesses or row.doubted > 0)
            if following:
                forced.append((row, following))
            elif matcher.is_done:
                whole.append(lane)
        if lanes.guesses:
            lanes.waits[own] = np.array(waits, np.bool_) | lanes.draws[own]
        for place in found.refused:
            self._refuse(rows[at[place]], found)
        return found

    def follow(self, found: Matched) -> None:
        """Add what must follow to the answers, which have got their tokens."""
        lanes = self.lanes
        for row, forced in found.forced:
            known = int(lanes.known[row.lane])
            followed = lanes.follow(row, forced)
            self.forced_tokens += followed
            assert row.request.constraint is not None
            if followed < len(forced):  # no room for them: the answer ends before
                row.matcher = row.request.constraint.start(lanes.output(row))
            assert row.matcher is not None
            if row.matcher.is_done:
                found.whole.append(row.lane)
            elif known + followed < row.limit:
                lanes.go_back(row, known - 1)
                found.back.append(row)

    def _refuse(self, row: Row | None, found: Matched) -> None:
        assert row is not None
        known = int(self.lanes.known[row.lane])
        self.lanes.go_back(row, known - 1)
        row.high_water = max(row.high_water, known)  # the token before was computed, and will be again
        row.doubt = row.doubted = min(2 * row.doubt, _MOST_DOUBT) or 1
        self.refused_tokens += 1
        found.back.append(row)
