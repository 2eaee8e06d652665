"""A server elsewhere in an engine's place: rows in, completions out, as EngineLoop expects them of an engine.

So folding, the result cache, budgets, limits and cancelling work as for the built-in engine. Requests go out in a
thread of their own, ``concurrency`` at a time; the engine's thread is woken when answers have come.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from spark_llm.engine.backend.chat import Chat
from spark_llm.engine.backend.connection import Connection, Refused
from spark_llm.engine.backend.embedding import Embedding
from spark_llm.engine.backend.text import MessageText, PlainText
from spark_llm.engine.backend.turns import Turns
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import EngineStats
from spark_llm.engine.request import Completion, Request
from spark_llm.engine.scheduling.accounts import Service
from spark_llm.engine.service.served import ModelName
from spark_llm.errors import LlmError

log = logging.getLogger("backend")

_DEFAULT = "default"
_T = TypeVar("_T")


class Asker(Protocol):
    """How rows are put to the server. most_rows: of one request. cost: tokens that a row may take."""

    @property
    def most_rows(self) -> int: ...

    def cost(self, request: Request) -> int: ...

    async def ask(self, requests: Sequence[Request]) -> list[Completion]:
        """The answers, in any order. Raises Refused, which then is the answer of all."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request to the server that is under way. rows: ids of those that somebody still waits for."""

    rows: set[int]
    task: asyncio.Task[None]


class RemoteEngine:
    """The server of ``spec.backend``. Raises LLM_BACKEND_KEY_MISSING, LLM_BACKEND_UNAVAILABLE, LLM_BACKEND_REFUSED, and
    LLM_BACKEND_MODEL_UNKNOWN where the server has several models and ``spec.model`` names none.

    connect: makes the connection, in the thread that uses it. on_answers: called when ``step`` has something to return,
    by another thread.
    """

    def __init__(self, spec: EngineSpec, connect: Callable[[], Connection] | None = None) -> None:
        backend = spec.backend
        assert backend is not None
        self.dtype = "remote"
        self.on_answers: Callable[[], object] = lambda: None
        self._concurrency = backend.concurrency
        self._rows: dict[int, _Asked | None] = {}  # without an answer, None while they wait for their turn; this and
        self._running = 0  # what follows: of the thread below
        self._sends = False  # soon
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._totals = EngineStats()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="backend", daemon=True).start()

        async def begin() -> Connection:
            return Connection(backend) if connect is None else connect()

        self._server = self._call(begin())
        listed = self._call(self._server.models())
        if spec.model == _DEFAULT and len(listed) != 1:
            reason = f"lists {len(listed)} models ({', '.join(listed[:10])})" if listed else "does not list its models"
            raise LlmError("LLM_BACKEND_MODEL_UNKNOWN", url=backend.url, reason=reason)
        self.model = listed[0] if spec.model == _DEFAULT else spec.model
        if listed and self.model not in listed:
            log.warning("the server %s does not list the model %r", backend.url, self.model)
        self.model_config = ModelName(self.model)
        self.text: MessageText | PlainText
        self._asker: Asker
        if spec.task == "embed":
            self._asker = embedding = Embedding(self._server, self.model)
            self.text = embedding.text
        else:
            self._asker = chat = Chat(self._server, self.model)
            self.text = chat.text
        self._turns = Turns(self._asker.cost)

    # ---- called by the engine's thread

    def open(self, stream: int, query: str) -> None:
        """A stream begins; its server need not know."""

    def close(self, stream: int) -> None:
        """The stream has ended."""

    def watch_evictions(self, evicted: Callable[[bytes, int, int], None]) -> None:
        """What the server's cache holds, nobody knows."""

    def add(self, request: Request) -> None:
        """A request arrives."""
        self._loop.call_soon_threadsafe(self._add, request)

    def cancel(self, ids: Iterable[int]) -> None:
        """Forget rows; requests that are under way are closed, which tells the server."""
        self._loop.call_soon_threadsafe(self._cancel, list(ids))

    def has_work(self) -> bool:
        """Whether ``step`` has answers to return."""
        return not self._done.empty()

    def step(self) -> list[Completion]:
        """The rows that are done; does not wait."""
        done = []
        while not self._done.empty():
            done.append(self._done.get())
        totals = self._totals
        totals.steps += 1
        for completion in done:
            totals.prompt_tokens += completion.prompt_tokens
            totals.cached_tokens += completion.cached_tokens
            totals.computed_tokens += completion.computed_tokens
            totals.output_tokens += completion.num_output
            totals.tokens += completion.computed_tokens + completion.num_output
            totals.rows_answered += completion.error is None
        return done

    def stats(self) -> EngineStats:
        """A live view of the totals: of answered rows, as the server counts their tokens."""
        self._totals.waiting = len(self._turns)
        self._totals.running = max(0, len(self._rows) - len(self._turns))
        return self._totals

    def clients(self) -> Mapping[str, Service]:
        """Nobody: the server takes rows as they come."""
        return {}

    def shutdown(self) -> None:
        """Closes the connections and ends the thread; no other method may be called after."""

        async def end() -> None:
            tasks = [asked.task for asked in set(self._rows.values()) if asked is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._server.close()

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    # ---- the thread of the connections

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _add(self, request: Request) -> None:
        self._rows[request.id] = None
        self._turns.push(request)
        self._send_soon()

    def _cancel(self, ids: Iterable[int]) -> None:
        cancelled = set(ids)
        self._turns.drop(cancelled)
        for request_id in cancelled:
            asked = self._rows.pop(request_id, None)
            if asked is not None:
                asked.rows.discard(request_id)
                if not asked.rows:
                    asked.task.cancel()

    def _send_soon(self) -> None:
        """After what else has come: rows that come together can go together."""
        if not self._sends:
            self._sends = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._sends = False
        while self._running < self._concurrency and len(self._turns):
            count = min(len(self._turns), self._asker.most_rows)
            requests = [self._turns.pop() for _ in range(count)]
            task = self._loop.create_task(self._answer(requests))
            asked = _Asked({request.id for request in requests}, task)
            self._rows.update(dict.fromkeys(asked.rows, asked))
            self._running += 1
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        self._send_soon()

    async def _answer(self, requests: list[Request]) -> None:
        try:
            completions = await self._asker.ask(requests)
        except Refused as refused:
            completions = [Completion.failed(request.id, *refused.failure) for request in requests]
        except Exception as error:  # else the rows would never be answered
            log.exception("rows could not be asked")
            reason = {"reason": f"{type(error).__name__}: {error}"}
            completions = [Completion.failed(request.id, "LLM_INVALID_REQUEST", reason) for request in requests]
        for completion in completions:
            if completion.id in self._rows:
                del self._rows[completion.id]
                self._done.put(completion)
        self.on_answers()
