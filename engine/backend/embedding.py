"""Asks a server's embeddings: several rows a request, halved where the server refuses them together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from spark_llm.engine.backend.connection import Connection, Refused, VectorReply
from spark_llm.engine.backend.text import PlainText, unpack
from spark_llm.engine.encoder.vectors import json_vectors
from spark_llm.engine.request import Completion, FinishReason, Request

_OF_ITS_TEXTS = ("400", "413", "422")  # refusals that another request, of other texts, may not get


class Embedding:
    """Rows as texts whose vectors the model ``model`` makes; see Asker."""

    most_rows = 32  # what the strictest of common servers takes

    def __init__(self, server: Connection, model: str) -> None:
        self.text = PlainText(model)
        self._server = server
        self._model = model

    def cost(self, request: Request) -> int:
        """Tokens of a row's text, as far as known here."""
        return len(request.prompt)

    async def ask(self, requests: Sequence[Request]) -> list[Completion]:
        """The vectors; a text that the server refuses fails alone."""
        try:
            return await self._ask(requests)
        except Refused as refused:
            if len(requests) == 1 or refused.failure[1].get("status") not in _OF_ITS_TEXTS:
                return [Completion.failed(request.id, *refused.failure) for request in requests]
        half = len(requests) // 2
        return [*await self.ask(requests[:half]), *await self.ask(requests[half:])]

    async def _ask(self, requests: Sequence[Request]) -> list[Completion]:
        lengths = [self.cost(request) for request in requests]
        texts = [msgspec.Raw(unpack(request.prompt)) for request in requests]
        body = msgspec.json.encode({"model": self._model, "input": texts})
        reply = await self._server.embed(body, len(texts), sum(lengths))
        with np.errstate(over="ignore"):  # what is beyond float32 is found not to be finite
            vectors = np.array([vector.embedding for vector in reply.data], np.float32)
        return [
            Completion.failed(request.id, "LLM_BACKEND_ANSWER_UNUSABLE", {"reason": "its vector is not finite"})
            if text is None
            else Completion(request.id, [], FinishReason.STOP, tokens, 0, tokens, text=text)
            for request, text, tokens in zip(requests, json_vectors(vectors), _shares(reply, lengths), strict=True)
        ]


def _shares(reply: VectorReply, lengths: Sequence[int]) -> list[int]:
    """Each text's tokens: of the whole request's, which is all that servers tell, by their lengths."""
    if reply.usage is None:
        return list(lengths)
    ends = np.cumsum(lengths) * reply.usage.prompt_tokens // max(1, sum(lengths))
    shares: list[int] = np.diff(ends, prepend=0).tolist()
    return shares
