"""Single flight: equal requests of one query are computed once, and the query's later ones take the answer.

Requests are equal if their query and key are. One row leads: it is tokenised and computed, and it reports what that
cost. Rows that come while it is on its way wait with it; rows that come later find the answer in a bounded memory.
A flight goes on as long as any of its rows is wanted: when the stream of the row that leads is closed, the next leads.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from spark_llm.engine.request import Completion, Request
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.protocol import ResultCache

ANSWER_BYTES = 64 << 20  # of answers that are kept for equal rows
_ENTRY_BYTES = 400  # of a kept answer, beside its tokens and its key
# an equal request fails likewise
_REFUSALS = frozenset(
    {
        "LLM_ANSWER_INCOMPLETE",
        "LLM_BACKEND_REFUSED",
        "LLM_BACKEND_UNAVAILABLE",
        "LLM_BUDGET_EXCEEDED",
        "LLM_CONSTRAINT_FAILED",
        "LLM_CONTEXT_LENGTH_EXCEEDED",
        "LLM_INVALID_CONSTRAINT",
        "LLM_INVALID_REQUEST",
    }
)


class Answer(NamedTuple):
    """What a stream is told of one of its rows.

    folded: another row of the query reports the cost. stored: the answer was in the result cache, and cost nothing.
    """

    row: int
    completion: Completion
    folded: bool
    stored: bool = False


@dataclass(eq=False)
class Stream:
    """One exchange. ``flights`` are those that its rows lead or wait for; ``Folding`` guards it.

    id: unique within the engine. scope: what all its rows have in common and an equal row must have, too, in bytes.
    node: of the query's plan, which may have a limit. cache: the result cache of its rows.
    outbox: answers to be written to the client; an empty list wakes the writer. error: what ends the stream.
    closed: nobody wants its rows any more; stopped: because the query has enough of them.
    """

    query: str = ""
    scope: bytes = b""
    id: int = -1
    node: str = ""
    cache: ResultCache | None = None
    outbox: queue.SimpleQueue[list[Answer]] = field(default_factory=queue.SimpleQueue)
    flights: set[Flight] = field(default_factory=set)
    closed: bool = False
    stopped: bool = False
    error: LlmError | None = None

    def fail(self, error: LlmError) -> None:
        """Ends the stream with ``error``."""
        self.error = error
        self.outbox.put([])


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way and the rows that get its answer: the first one leads, the others are folded.

    request: None until the leading row is tokenised. key: None for a row that never folds.
    """

    key: tuple[str, bytes] | None
    rows: list[tuple[Stream, int]]
    request: Request | None = None
    repeated: bool = False


class Claim(NamedTuple):
    """Of a batch of rows: positions and flights of those to be computed, and how many are answered already."""

    positions: list[int]
    flights: list[Flight]
    answered: int


class Folding:
    """Which rows are computed, and who gets the answers. The threads of streams and of the engine share it.

    most_bytes: bound of the memory of answers; those of all queries are kept until it is full, the ones used least
    recently go first. Failed answers are never kept.
    """

    def __init__(self, most_bytes: int = ANSWER_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._flights: dict[tuple[str, bytes], Flight] = {}
        self._answers: OrderedDict[tuple[str, bytes], Completion] = OrderedDict()
        self.kept_bytes = 0

    def claim(self, stream: Stream, rows: Sequence[int], keys: Sequence[bytes | None]) -> Claim:
        """Takes in rows of ``stream``. Rows that the claim does not name as to be computed are folded:

        their answers come in time, or are in the stream's outbox already. Rows of a closed stream are dropped.
        """
        positions, flights, known = [], [], []
        with self._lock:
            if stream.closed:
                return Claim([], [], 0)
            for position, (row, given) in enumerate(zip(rows, keys, strict=True)):
                key = (stream.query, stream.scope + given) if given is not None and stream.query else None
                flight = None
                if key is not None:
                    answer = self._answers.get(key)
                    if answer is not None:
                        self._answers.move_to_end(key)
                        known.append(Answer(row, answer, folded=True))
                        continue
                    flight = self._flights.get(key)
                if flight is not None:
                    flight.rows.append((stream, row))
                else:
                    flight = Flight(key, [(stream, row)])
                    positions.append(position)
                    flights.append(flight)
                    if key is not None:
                        self._flights[key] = flight
                stream.flights.add(flight)
        if known:
            stream.outbox.put(known)
        return Claim(positions, flights, len(known))

    def wanted(self, flight: Flight) -> bool:
        """Whether somebody still waits for the flight; if not, it is over."""
        with self._lock:
            if not self._prune(flight):
                self._end(flight)
            return bool(flight.rows)

    def give_up(self, flights: Iterable[Flight], error: LlmError) -> None:
        """Flights of a batch that cannot be tokenised: all streams that wait for them fail with ``error``."""
        with self._lock:
            streams = {stream for flight in flights for stream, _ in flight.rows}
            for flight in flights:
                self._end(flight)
        for stream in streams:
            stream.fail(error)

    def close(self, stream: Stream) -> list[int]:
        """The stream is closed: ids of the requests that nobody waits for any more."""
        cancelled = []
        with self._lock:
            for flight in list(stream.flights):
                if not self._prune(flight):
                    self._end(flight)
                    if flight.request is not None:
                        cancelled.append(flight.request.id)
            stream.flights.clear()
        return cancelled

    def settle(
        self, flight: Flight, completion: Completion, stored: bool = False
    ) -> tuple[dict[Stream, list[Answer]], bool]:
        """A flight's request is done: who is told what, and whether it is to be computed once more.

        What failed by chance is told to the row that led; the others get one more try. stored: the completion comes
        from the result cache.
        """
        with self._lock:
            if not self._prune(flight):
                self._end(flight)
                return {}, False
            (leader, row), *others = flight.rows
            told = {leader: [Answer(row, completion, folded=False, stored=stored)]}
            if completion.error is None:
                answer = _free_of_cost(completion)
                if flight.key is not None:
                    self._keep(flight.key, answer)
            elif others and not flight.repeated and completion.error[0] not in _REFUSALS:
                flight.rows, flight.repeated = others, True
                if all(stream is not leader for stream, _ in others):
                    leader.flights.discard(flight)
                return told, True
            else:
                answer = _free_of_cost(completion)
            for stream, waiting in others:
                told.setdefault(stream, []).append(Answer(waiting, answer, folded=True))
            self._end(flight)
        return told, False

    def _prune(self, flight: Flight) -> bool:
        """Forget rows of closed streams, and these the flight; whether any row is left.

        A stream is closed before the engine hears of it. What ends meanwhile must not be cancelled then.
        """
        if any(stream.closed for stream, _ in flight.rows):
            for stream, _ in flight.rows:
                if stream.closed:
                    stream.flights.discard(flight)
            flight.rows = [(stream, row) for stream, row in flight.rows if not stream.closed]
        return bool(flight.rows)

    def _end(self, flight: Flight) -> None:
        for stream, _ in flight.rows:
            stream.flights.discard(flight)
        flight.rows = []
        if flight.key is not None and self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _keep(self, key: tuple[str, bytes], answer: Completion) -> None:
        assert key not in self._answers, "an answer that is kept was computed again"
        self._answers[key] = answer
        self.kept_bytes += _size(key, answer)
        while self.kept_bytes > self._most_bytes:
            self.kept_bytes -= _size(*self._answers.popitem(last=False))


def _free_of_cost(completion: Completion) -> Completion:
    """The same answer as a folded row gets it: all that it cost is told elsewhere."""
    return replace(
        completion, prompt_tokens=0, cached_tokens=0, computed_tokens=0, recomputed_tokens=0, instruction_tokens=0
    )


def _size(key: tuple[str, bytes], answer: Completion) -> int:
    return (
        _ENTRY_BYTES + len(key[1]) + len(answer.text or "") + 40 * len(answer.output)
    )  # a list of numbers, each an object
