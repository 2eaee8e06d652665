"""The one thread that owns the engine: takes rows and cancellations from streams, steps, hands answers back.

Streams talk to it through a queue only; the engine itself is never touched by another thread.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spark_llm.engine.request import Completion, Request
from spark_llm.engine.service.budgets import Budgets
from spark_llm.engine.service.dispatch_held import Held
from spark_llm.engine.service.folding import Answer, Claim, Flight, Folding, Stream
from spark_llm.engine.service.limits import Limits
from spark_llm.engine.service.protocol import ClientStatus, EngineStatus, WindowRequest
from spark_llm.engine.service.results import Results

if TYPE_CHECKING:
    from spark_llm.engine.service.served import ServedEngine

log = logging.getLogger("loop")

RATE_SECONDS = 5.0  # tokens per second are those of the last few seconds
KEPT_QUERIES = 256  # finished queries whose counts the status still tells


class EngineLoop:
    """Runs ``engine`` in a thread until the process ends. ``on_fatal`` is told what no step can recover from.

    fingerprint: names the model, for answers that outlive the process; called when the first of them is to be kept.
    folding, results, budgets: where streams ask which of their rows are to be computed.
    """

    def __init__(
        self,
        engine: ServedEngine,
        on_fatal: Callable[[BaseException], None],
        fingerprint: Callable[[], str] = lambda: "unknown",
    ) -> None:
        self.folding = Folding()
        self.results = Results(fingerprint)
        self.budgets = Budgets()
        self.held: Held | None = None  # prefixes that a router knows, once there is one
        self._limits = Limits()
        self._engine = engine
        self._on_fatal = on_fatal
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._flights: dict[int, Flight] = {}  # by the engine's id of its request
        self._limited: dict[tuple[str, str], set[Stream]] = {}  # by query and node
        self._rows_received = self._rows_answered = self._rows_folded = self._rows_stored = 0
        self._queries: dict[str, list[int]] = {}
        self._rate: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._stats = engine.stats()
        self._clients = engine.clients()
        self._started = time.monotonic()
        self._open_streams = 0
        self._idle_since: float | None = self._started
        self._lock = threading.Lock()  # of the count of streams

    def start(self) -> None:
        """Starts the thread; from now on the engine is its own."""
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    # ---- called by the threads of streams

    def next_id(self) -> int:
        """An id for a Request or a Stream that no other has."""
        return next(self._ids)

    def open(self, stream: Stream) -> None:
        with self._lock:
            self._open_streams += 1
            self._idle_since = None
        self._inbox.put(lambda: self._open(stream))

    def submit(self, stream: Stream, received: int, claim: Claim, outcomes: Sequence[Request | Completion]) -> None:
        """What is to become of the claim's flights: those of ``received`` rows that do not fold.

        A Request is for the engine; a Completion is there already, from the result cache or as a refusal.
        """
        self._inbox.put(lambda: self._add(stream, received, claim, outcomes))

    def wake(self) -> None:
        """The engine has work that nobody submitted: answers from elsewhere have come."""
        self._inbox.put(lambda: None)

    def window(self, request: WindowRequest) -> int:
        """Rows of the task's next window; 0 if the limit is reached: then all open streams of the node are stopped."""
        rows = self._limits.grant(request)
        if not rows:
            self._inbox.put(lambda: self._stop(request.query, request.node))
        return rows

    def watch_evictions(self) -> Held:
        """From now on ``held`` knows what streams ask and what the engine evicts of it."""
        if self.held is None:
            self.held = held = Held()
            self._inbox.put(lambda: self._engine.watch_evictions(held.evicted))
        return self.held

    def close(self, stream: Stream) -> None:
        """Forgets the stream and cancels its rows before the next step."""
        stream.closed = True
        with self._lock:
            self._open_streams -= 1
            self._idle_since = time.monotonic() if self._open_streams == 0 else None
            last = self._open_streams == 0
        self._inbox.put(lambda: self._close(stream))
        if last:
            self.results.flush()

    def idle_seconds(self) -> float:
        """How long no stream has been open."""
        with self._lock:
            return 0.0 if self._idle_since is None else time.monotonic() - self._idle_since

    def status(self, pid: int, owner: int) -> EngineStatus:
        """A snapshot from after the latest step."""
        stats, rate, results = self._stats, list(self._rate), self.results.sizes()
        now = time.monotonic()
        recent = [point for point in rate if now - point[0] <= RATE_SECONDS] or rate[-1:]
        span = now - recent[0][0]
        return EngineStatus(
            pid=pid,
            owner=owner,
            model=self._engine.model_config.name,
            dtype=self._engine.dtype,
            uptime=now - self._started,
            rows_received=self._rows_received,
            rows_answered=self._rows_answered,
            rows_folded=self._rows_folded,
            rows_stored=self._rows_stored,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            computed_tokens=stats.computed_tokens,
            output_tokens=stats.output_tokens,
            tokens_per_second=(rate[-1][1] - recent[0][1]) / span if span > 0 else 0.0,
            waiting=stats.waiting,
            running=stats.running,
            free_pages=stats.free_pages,
            total_pages=stats.total_pages,
            streams=self._open_streams,
            forward_seconds=stats.forward_seconds,
            step_seconds=stats.step_seconds,
            cache_answers=results.answers,
            cache_bytes=results.bytes,
            cache_segments=results.segments,
            queries={query: (counts[0], counts[1]) for query, counts in list(self._queries.items())},
            clients={user: ClientStatus(*service) for user, service in self._clients.items()},
        )

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            while True:
                self._take_messages()
                if self._engine.has_work():
                    self._dispatch(self._engine.step())
                self._publish()
        except BaseException as error:
            log.exception("the engine's thread failed; the process ends")
            self._on_fatal(error)

    def _take_messages(self) -> None:
        """All that waits in the inbox; blocks while there is nothing else to do."""
        if not self._engine.has_work():
            self._inbox.get()()
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message()

    def _open(self, stream: Stream) -> None:
        self._engine.open(stream.id, stream.query)
        self._count(stream.query, 0, 0)
        if stream.node:
            self._limited.setdefault((stream.query, stream.node), set()).add(stream)

    def _add(self, stream: Stream, received: int, claim: Claim, outcomes: Sequence[Request | Completion]) -> None:
        if not stream.closed:
            self._count(stream.query, received, claim.answered)
            self._rows_folded += claim.answered
        answers: dict[Stream, list[Answer]] = {}
        for flight, outcome in zip(claim.flights, outcomes, strict=True):
            if isinstance(outcome, Completion):
                told, again = self.folding.settle(flight, outcome, stored=outcome.error is None)
                assert not again, "a row that is not computed failed by chance"
                for waiting, answered in told.items():
                    answers.setdefault(waiting, []).extend(answered)
            elif self.folding.wanted(flight):
                self._compute(flight, outcome)
        for waiting, answered in answers.items():
            self._tell(waiting, answered)

    def _compute(self, flight: Flight, request: Request) -> None:
        flight.request = request
        self._flights[request.id] = flight
        self._engine.add(request)

    def _stop(self, query: str, node: str) -> None:
        for stream in self._limited.get((query, node), ()):
            if not stream.closed:
                stream.closed = stream.stopped = True
                self._cancel(stream)
                stream.outbox.put([])

    def _close(self, stream: Stream) -> None:
        self._cancel(stream)
        self._engine.close(stream.id)
        if stream.node:
            left = self._limited[stream.query, stream.node]
            left.discard(stream)
            if not left:
                del self._limited[stream.query, stream.node]

    def _cancel(self, stream: Stream) -> None:
        cancelled = self.folding.close(stream)
        if cancelled:
            log.info("cancelled rows=%d query=%r", len(cancelled), stream.query)
            self._engine.cancel(cancelled)
        for engine_id in cancelled:
            del self._flights[engine_id]

    def _dispatch(self, completions: list[Completion]) -> None:
        answers: dict[Stream, list[Answer]] = {}
        for completion in completions:
            flight = self._flights.pop(completion.id, None)
            if flight is None:  # cancelled, but the engine had already refused it
                continue
            told, again = self.folding.settle(flight, completion)
            self._keep(flight, completion, told)
            for stream, answered in told.items():
                answers.setdefault(stream, []).extend(answered)
            if again:
                assert flight.request is not None
                self._compute(flight, replace(flight.request, id=self.next_id()))
        for stream, answered in answers.items():
            self._tell(stream, answered)

    def _keep(self, flight: Flight, completion: Completion, told: Iterable[Stream]) -> None:
        """Accounts for a computed row, and leaves its answer to the result cache."""
        for stream in told:
            self.budgets.answered(stream.query, completion.num_output)
            break
        cache = next((stream.cache for stream in told if stream.cache is not None), None)
        if cache is not None and flight.key is not None and completion.error is None:
            self.results.keep(cache, flight.key[1], completion)

    def _tell(self, stream: Stream, answers: list[Answer]) -> None:
        self._rows_folded += sum(answer.folded for answer in answers)
        self._rows_stored += sum(answer.stored for answer in answers)
        self._count(stream.query, 0, len(answers))
        stream.outbox.put(answers)

    def _count(self, query: str, received: int, answered: int) -> None:
        self._rows_received += received
        self._rows_answered += answered
        counts = self._queries.pop(query, [0, 0])  # last used last
        self._queries[query] = [counts[0] + received, counts[1] + answered]
        if len(self._queries) > KEPT_QUERIES:
            del self._queries[next(iter(self._queries))]

    def _publish(self) -> None:
        self._stats = self._engine.stats()
        now = time.monotonic()
        is_due = now - self._rate[-1][0] >= RATE_SECONDS / 20
        if is_due or not self._engine.has_work():  # clients may be many
            self._clients = self._engine.clients()
        if is_due:
            self._rate.append((now, self._stats.tokens))
            while now - self._rate[0][0] > RATE_SECONDS and len(self._rate) > 1:
                self._rate.popleft()
