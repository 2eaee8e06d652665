"""A server elsewhere in an engine's place: rows in, completions out, as EngineLoop expects them of an engine.

So folding, the result cache, budgets, limits and cancelling work as for the built-in engine. Requests go out in a
thread of their own, ``concurrency`` at a time; the engine's thread is woken when answers have come.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from spark_llm.engine.backend.connection import Connection, Refused, Reply
from spark_llm.engine.backend.form import AnswerFormat, WrongAnswer
from spark_llm.engine.backend.text import MessageText, pack, unpack
from spark_llm.engine.backend.turns import Turns
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import EngineStats
from spark_llm.engine.request import Completion, FinishReason, Request
from spark_llm.engine.scheduling.accounts import Service
from spark_llm.engine.service.served import ModelName
from spark_llm.errors import LlmError

log = logging.getLogger("backend")

_DEFAULT = "default"
_T = TypeVar("_T")


@dataclass(slots=True)
class _Row:
    """task: None while the row waits for its turn."""

    request: Request
    task: asyncio.Task[None] | None = None


class RemoteEngine:
    """The server of ``spec.backend``. Raises LLM_BACKEND_KEY_MISSING, LLM_BACKEND_UNAVAILABLE, LLM_BACKEND_REFUSED, and
    LLM_BACKEND_MODEL_UNKNOWN where the server has several models and ``spec.model`` names none.

    connect: makes the connection, in the thread that uses it. on_answers: called when ``step`` has something to return,
    by another thread.
    """

    def __init__(self, spec: EngineSpec, connect: Callable[[], Connection] | None = None) -> None:
        backend = spec.backend
        assert backend is not None
        self.text = MessageText()
        self.dtype = "remote"
        self.on_answers: Callable[[], object] = lambda: None
        self._concurrency = backend.concurrency
        self._turns = Turns()
        self._rows: dict[int, _Row] = {}  # that are not answered; this and what follows: of the thread below
        self._running = 0
        self._max_tokens_name = "max_tokens"
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
        self._totals.running = self._running
        self._totals.waiting = len(self._rows) - self._running
        return self._totals

    def clients(self) -> Mapping[str, Service]:
        """Nobody: the server takes rows as they come."""
        return {}

    def shutdown(self) -> None:
        """Closes the connections and ends the thread; no other method may be called after."""

        async def end() -> None:
            tasks = [row.task for row in self._rows.values() if row.task is not None]
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
        self._rows[request.id] = _Row(request)
        self._turns.push(request)
        self._send()

    def _cancel(self, ids: Iterable[int]) -> None:
        for request_id in ids:
            row = self._rows.pop(request_id, None)
            if row is not None and row.task is not None:
                row.task.cancel()

    def _send(self) -> None:
        while self._running < self._concurrency and len(self._turns):
            row = self._rows.get(self._turns.pop().id)
            if row is None:  # cancelled
                continue
            self._running += 1
            row.task = self._loop.create_task(self._answer(row.request))
            row.task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        self._send()

    async def _answer(self, request: Request) -> None:
        try:
            completion = await self._ask(request)
        except Refused as refused:
            completion = _failed(request, refused.failure)
        except Exception as error:  # else the row would never be answered
            log.exception("a row could not be asked")
            completion = _failed(request, ("LLM_INVALID_REQUEST", {"reason": f"{type(error).__name__}: {error}"}))
        if self._rows.pop(request.id, None) is not None:
            self._done.put(completion)
            self.on_answers()

    async def _ask(self, request: Request) -> Completion:
        tokens = len(request.prompt) + request.params.max_tokens
        try:
            reply = await self._server.complete(self._body(request), tokens)
        except Refused as refused:
            # newer models of OpenAI know the limit by another name, and say so
            reason = refused.failure[1]["reason"]
            if self._max_tokens_name == "max_completion_tokens" or "max_completion_tokens" not in reason:
                raise
            self._max_tokens_name = "max_completion_tokens"
            reply = await self._server.complete(self._body(request), tokens)
        return _completion(request, reply)

    def _body(self, request: Request) -> bytes:
        params = request.params
        body: dict[str, object] = {
            "model": self.model,
            "messages": msgspec.Raw(unpack(request.prompt)),
            self._max_tokens_name: params.max_tokens,
            "temperature": params.temperature,
        }
        if params.top_p != 1.0:
            body["top_p"] = params.top_p
        if params.top_k:
            body["top_k"] = params.top_k  # not OpenAI's, but most servers'
        if params.stop:
            body["stop"] = params.stop
        if request.seed is not None:
            body["seed"] = request.seed
        if isinstance(request.constraint, AnswerFormat):
            body["response_format"] = msgspec.Raw(request.constraint.response_format)
        return msgspec.json.encode(body)


def _completion(request: Request, reply: Reply) -> Completion:
    choice, usage = reply.choices[0], reply.usage
    text = choice.message.content
    if choice.finish_reason not in ("stop", "length", None) or text is None:
        reason = choice.message.refusal or f"it ended the answer for the reason {choice.finish_reason!r}"
        return _failed(request, ("LLM_BACKEND_ANSWER_UNUSABLE", {"reason": reason}))
    is_cut = choice.finish_reason == "length"
    if isinstance(request.constraint, AnswerFormat):
        if is_cut:
            parameters = {"kind": request.constraint.kind, "max_tokens": str(request.params.max_tokens)}
            return _failed(request, ("LLM_ANSWER_INCOMPLETE", parameters))
        try:
            text = request.constraint.read(text)
        except WrongAnswer as error:
            return _failed(request, ("LLM_BACKEND_ANSWER_UNUSABLE", {"reason": str(error)}))
    output = pack(text.strip().encode()).tolist()
    return Completion(
        request.id,
        output,
        FinishReason.LENGTH if is_cut else FinishReason.STOP,
        prompt_tokens=usage.prompt_tokens if usage else len(request.prompt),
        cached_tokens=usage.cached_tokens if usage else 0,
        computed_tokens=usage.prompt_tokens - usage.cached_tokens if usage else len(request.prompt),
        output_tokens=usage.completion_tokens if usage else len(output),
    )


def _failed(request: Request, error: tuple[str, dict[str, str]]) -> Completion:
    return Completion(request.id, [], FinishReason.ERROR, 0, 0, 0, error=error)
