"""One HTTP request's rows in the engine: in by its event loop, out as they finish, cancelled when nobody waits."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spark_llm.engine.constraints.labels import Labels
from spark_llm.engine.constraints.matcher import CompiledConstraint
from spark_llm.engine.request import (
    Client,
    Completion,
    Constraint,
    Hints,
    Request,
    SamplingParams,
    TokenIds,
)
from spark_llm.engine.service.folding import Answer, Stream
from spark_llm.engine.service.protocol import EngineStatus

if TYPE_CHECKING:
    from spark_llm.engine.service.loop import EngineLoop
    from spark_llm.engine.text.pipeline import TextPipeline


@dataclass(frozen=True, slots=True)
class Row:
    """One answer that is wanted."""

    prompt: TokenIds
    params: SamplingParams
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What an answer has got: more text, or its end, with all that it cost."""

    row: int
    text: str = ""
    end: Completion | None = None


class _Outbox(queue.SimpleQueue[list[Answer]]):
    """Hands the answers of a stream to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece | None]) -> None:
        self._loop = loop
        self._pieces = pieces

    def put(self, item: list[Answer], block: bool = True, timeout: float | None = None) -> None:
        """Called by the engine's thread; an empty list means that the stream's state has changed."""
        pieces: list[Piece | None] = [Piece(answer.row, end=answer.completion) for answer in item]
        for piece in pieces or [None]:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Exchange:
    """Puts rows to the engine behind ``loop``, on behalf of clients of the HTTP server."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def status(self, pid: int) -> EngineStatus:
        """The engine's counters."""
        return self._loop.status(pid, 0)

    async def pieces(
        self, rows: int, requests: Callable[[int, asyncio.Queue[Piece | None]], Sequence[Request]]
    ) -> AsyncGenerator[Piece, None]:
        """The ends of so many rows as they come. Closing the iterator cancels what is open.

        requests: makes them, of the stream's id and the queue of pieces, into which more than ends may be put.
        Raises LlmError: what ended the stream.
        """
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        stream = Stream(id=self._loop.next_id(), outbox=_Outbox(asyncio.get_running_loop(), pieces))
        self._loop.open(stream)
        try:
            claim = self._loop.folding.claim(stream, range(rows), [None] * rows)
            self._loop.submit(stream, rows, claim, requests(stream.id, pieces))
            open_rows = rows
            while open_rows:
                piece = await pieces.get()
                if stream.error is not None:
                    raise stream.error
                if piece is not None:
                    open_rows -= piece.end is not None
                    yield piece
        finally:
            self._loop.close(stream)


class Answers(Exchange):
    """Asks an engine that generates."""

    def __init__(self, loop: EngineLoop, text: TextPipeline, context_length: int) -> None:
        super().__init__(loop)
        self.text = text
        self.context_length = context_length

    def run(
        self, rows: Sequence[Row], client: Client, constraint: Constraint | None = None, streams: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """The rows' ends as they come; with ``streams`` their texts before. See ``pieces``.

        Raises LlmError: LLM_INVALID_CONSTRAINT.
        """
        compiled = None if constraint is None else self.text.constrain(None, constraint)

        def requests(stream: int, pieces: asyncio.Queue[Piece | None]) -> list[Request]:
            loop = asyncio.get_running_loop()
            told = [self._teller(number, row, loop, pieces) if streams else None for number, row in enumerate(rows)]
            return [self._request(row, client, compiled, stream, tell) for row, tell in zip(rows, told, strict=True)]

        return self.pieces(len(rows), requests)

    def answer_text(self, completion: Completion, stop: Sequence[str]) -> str:
        """The whole text of an answer, white space and all."""
        if completion.text is not None:
            return completion.text
        return self.text.decode([completion.output], stop, strips=False)[0]

    def _request(
        self,
        row: Row,
        client: Client,
        constraint: CompiledConstraint | None,
        stream: int,
        tell: Callable[[Sequence[int]], None] | None,
    ) -> Request:
        params = row.params
        if isinstance(constraint, Labels):
            params, tell = SamplingParams(max_tokens=constraint.max_tokens, temperature=params.temperature), None
        checks = self.text.stop_checker(params.stop)

        def is_stopped(output: Sequence[int]) -> bool:
            if tell is not None:
                tell(output)
            return checks is not None and checks(output)

        return Request(
            id=self._loop.next_id(),
            prompt=row.prompt,
            params=params,
            client=client,
            seed=row.seed,
            is_stopped=checks if tell is None else is_stopped,
            constraint=constraint,
            hints=Hints(stream),
        )

    def _teller(
        self, number: int, row: Row, loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece | None]
    ) -> Callable[[Sequence[int]], None]:
        """Told an answer's tokens so far, by the engine's thread; its text goes out as far as no stop string can begin
        in it."""
        decode, stop = self.text.decoder(), [text for text in row.params.stop if text]
        seen = 0
        held = ""

        def tell(output: Sequence[int]) -> None:
            nonlocal seen, held
            held += "".join(map(decode, output[seen:]))
            seen = len(output)
            if any(text in held for text in stop):
                return  # the end of the answer brings what is left of it
            keep = max((size for text in stop for size in range(1, len(text)) if held.endswith(text[:size])), default=0)
            ready, held = held[: len(held) - keep], held[len(held) - keep :]
            if ready:
                loop.call_soon_threadsafe(pieces.put_nowait, Piece(number, ready))

        return tell
