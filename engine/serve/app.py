"""The HTTP server's routes: OpenAI's protocol over the engine's rows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from spark_llm.engine.request import Completion
from spark_llm.engine.serve.answering import Answers, Piece, Row
from spark_llm.engine.serve.api import MOST_ANSWERS, ApiError, ChatRequest, CompletionRequest, parse
from spark_llm.engine.serve.base import BaseServer
from spark_llm.engine.serve.keys import ApiKeys
from spark_llm.engine.serve.web import (
    as_api_error,
    checked,
    event,
    json_response,
    read_body,
    while_connected,
)
from spark_llm.engine.serve.words import ChatWords, CompletionWords, Words, finish_reason, usage_of
from spark_llm.engine.text.template import Turn
from spark_llm.errors import LlmError

_Asked = ChatRequest | CompletionRequest


class Server(BaseServer):
    """The server of a model that generates."""

    def __init__(self, answers: Answers, names: tuple[str, ...], keys: ApiKeys) -> None:
        super().__init__(answers.status, names, keys)
        self._answers = answers

    # ---- routes

    async def _chat(self, request: Request) -> Response:
        client = self._client(request)
        asked = parse(await read_body(request), ChatRequest)
        # newer clients call the system message that of the developer
        turns = [
            Turn(role="system" if message.role == "developer" else message.role, content=message.text)
            for message in asked.messages
        ]
        prompt = await asyncio.to_thread(self._answers.text.encode_conversation, turns)
        room = max(1, self._answers.context_length - len(prompt))
        rows = await asyncio.to_thread(self._rows, asked, [prompt], asked.most_tokens or room)
        return await self._respond(request, asked, rows, client, ChatWords(self._names[0]))

    async def _completions(self, request: Request) -> Response:
        client = self._client(request)
        asked = parse(await read_body(request), CompletionRequest)
        prompts = [await asyncio.to_thread(self._ids, prompt) for prompt in asked.prompts]
        rows = await asyncio.to_thread(self._rows, asked, prompts, asked.most_tokens or 16)
        return await self._respond(request, asked, rows, client, CompletionWords(self._names[0]))

    async def _embeddings(self, request: Request) -> Response:
        raise self._other_task(request, "answers prompts and makes no embeddings")

    # ---- what they share

    def _ids(self, prompt: str | list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
        if isinstance(prompt, str):
            return self._answers.text.encode_text(prompt)
        size = self._answers.text.vocab_size
        if any(not 0 <= token < size for token in prompt):
            raise ApiError(400, f"Token ids are 0 to {size - 1}", param="prompt")
        return np.array(prompt, np.int32)

    def _rows(self, asked: _Asked, prompts: list[Any], max_tokens: int) -> list[Row]:
        self._check_model(asked.model)
        count = asked.n or 1
        if not 0 < len(prompts) * count <= MOST_ANSWERS:
            raise ApiError(400, f"A request has 1 to {MOST_ANSWERS} answers, of all its prompts together", param="n")
        constraint = asked.constraint()
        if constraint is not None:
            self._answers.text.constrain(None, constraint)  # what is wrong with it is told before a stream begins
        if constraint is not None and asked.stop:
            raise ApiError(400, "Stop strings would end answers before they keep to their format", param="stop")
        for prompt in prompts:
            if len(prompt) + max_tokens > self._answers.context_length:
                raise LlmError(
                    "LLM_CONTEXT_LENGTH_EXCEEDED",
                    excess=f"The prompt has {len(prompt)} tokens and max_tokens is {max_tokens}",
                    limit=self._answers.context_length,
                    remedy="Shorten the prompt, lower max_tokens",
                )
        params = asked.params(max_tokens)
        seeds = [None if asked.seed is None else (asked.seed + number) % 2**63 for number in range(count)]
        return [Row(prompt, params, seed) for prompt in prompts for seed in seeds]

    async def _respond(self, request: Request, asked: _Asked, rows: list[Row], client: str, words: Words) -> Response:
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = self._events(rows, client, asked, words, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        ends = await while_connected(request, self._ends(rows, client, asked))
        choices = [
            words.choice(number, self._answers.answer_text(end, rows[number].params.stop), finish_reason(end))
            for number, end in enumerate(ends)
        ]
        return json_response(words.head() | {"choices": choices, "usage": usage_of(ends, asked.n or 1)})

    async def _ends(self, rows: list[Row], holder: str, asked: _Asked) -> list[Completion]:
        ends: dict[int, Completion] = {}
        async with self._pieces(rows, holder, asked) as pieces:
            async for piece in pieces:
                if piece.end is not None:
                    ends[piece.row] = checked(piece.end)
        return [ends[number] for number in range(len(rows))]

    @contextlib.asynccontextmanager
    async def _pieces(
        self, rows: list[Row], holder: str, asked: _Asked, streams: bool = False
    ) -> AsyncIterator[AsyncIterator[Piece]]:
        """The rows' answers as they come, charged to the request's user; what is open is cancelled at the end."""
        with self._users.asking(holder, asked.user) as client:
            async with contextlib.aclosing(self._answers.run(rows, client, asked.constraint(), streams)) as pieces:
                yield pieces

    async def _events(
        self, rows: list[Row], holder: str, asked: _Asked, words: Words, tells_usage: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events. What fails after the first of them can only be told as one."""
        sent = [""] * len(rows)
        ends = []
        try:
            for number in range(len(rows)):
                if (first := words.opening(number)) is not None:
                    yield event(words.chunk_head() | {"choices": [first]})
            async with self._pieces(rows, holder, asked, streams=True) as pieces:
                async for piece in pieces:
                    text, reason = piece.text, None
                    if piece.end is not None:
                        ends.append(checked(piece.end))
                        whole = self._answers.answer_text(piece.end, rows[piece.row].params.stop)
                        text = whole.removeprefix(sent[piece.row]) if whole.startswith(sent[piece.row]) else ""
                        reason = finish_reason(piece.end)
                    sent[piece.row] += text
                    yield event(words.chunk_head() | {"choices": [words.delta(piece.row, text, reason)]})
            if tells_usage:
                yield event(words.chunk_head() | {"choices": [], "usage": usage_of(ends, asked.n or 1)})
            yield b"data: [DONE]\n\n"
        except (ApiError, LlmError) as error:
            yield event((error if isinstance(error, ApiError) else as_api_error(error)).body)
