"""The HTTP server of a model that makes vectors of texts: OpenAI's embeddings."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from spark_llm.engine.encoder.vectors import excess
from spark_llm.engine.request import Client, Completion, Hints, Request, SamplingParams, TokenIds
from spark_llm.engine.serve.answering import Exchange, Piece
from spark_llm.engine.serve.api import ApiError, EmbeddingRequest, parse
from spark_llm.engine.serve.base import BaseServer
from spark_llm.engine.serve.keys import ApiKeys
from spark_llm.engine.serve.web import checked, json_response, read_body, while_connected
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.encoder.text import EncoderText
    from spark_llm.engine.service.loop import EngineLoop

_DOES = "makes embeddings and answers no prompts"


class EmbeddingServer(BaseServer):
    """The server of the engine behind ``loop``, whose task is ``embed``. width: of its vectors."""

    def __init__(self, loop: EngineLoop, text: EncoderText, width: int, names: tuple[str, ...], keys: ApiKeys) -> None:
        self._exchange = Exchange(loop)
        super().__init__(self._exchange.status, names, keys)
        self._loop = loop
        self._text = text
        self._width = width

    async def _chat(self, request: HttpRequest) -> Response:
        raise self._other_task(request, _DOES)

    async def _completions(self, request: HttpRequest) -> Response:
        raise self._other_task(request, _DOES)

    async def _embeddings(self, request: HttpRequest) -> Response:
        holder = self._client(request)
        asked = parse(await read_body(request), EmbeddingRequest)
        self._check_model(asked.model)
        if asked.dimensions not in (None, self._width):
            message = f"The model's vectors have {self._width} dimensions and cannot be shortened"
            raise ApiError(400, message, param="dimensions")
        with self._users.asking(holder, asked.user) as client:
            ends = await while_connected(request, self._ends(asked.texts, client))
        form = _base64 if asked.encoding_format == "base64" else _numbers
        data = [
            {"object": "embedding", "index": number, "embedding": form(end.text or "")}
            for number, end in enumerate(ends)
        ]
        tokens = sum(end.prompt_tokens for end in ends)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def _ends(self, texts: Sequence[str], client: Client) -> list[Completion]:
        prompts = await asyncio.to_thread(self._text.encode_texts, texts)
        self._check_lengths(prompts)

        def requests(stream: int, _: asyncio.Queue[Piece | None]) -> list[Request]:
            params, hints = SamplingParams(max_tokens=0), Hints(stream)
            return [Request(self._loop.next_id(), prompt, params, client, hints=hints) for prompt in prompts]

        ends: dict[int, Completion] = {}
        async with contextlib.aclosing(self._exchange.pieces(len(prompts), requests)) as pieces:
            async for piece in pieces:
                if piece.end is not None:
                    ends[piece.row] = checked(piece.end)
        return [ends[number] for number in range(len(prompts))]

    def _check_lengths(self, prompts: Sequence[TokenIds]) -> None:
        """Raises LLM_CONTEXT_LENGTH_EXCEEDED for the first text that is too long, before any is embedded."""
        limit = self._text.window
        for number, prompt in enumerate(prompts):
            if len(prompt) > limit:
                remedy = "Shorten it, or send it in parts"
                told = excess(len(prompt), limit, remedy, f"Text {number} of the input")
                raise LlmError("LLM_CONTEXT_LENGTH_EXCEEDED", **told)


def _numbers(vector: str) -> msgspec.Raw:
    return msgspec.Raw(vector.encode())


def _base64(vector: str) -> str:
    """Of its float32, little-endian."""
    return base64.b64encode(np.array(msgspec.json.decode(vector), "<f4").tobytes()).decode()
