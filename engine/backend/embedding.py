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
_HARMLESS = b'"a"'  # a text that no server has a reason to refuse


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
        """The vectors; a text that the server refuses fails alone.

        Where a request of several texts is refused, the server is first asked for the vector of a harmless one: if it
        refuses that as well, it refuses everything, and no text is asked alone.
        """
        try:
            return await self._ask(requests)
        except Refused as refused:
            if len(requests) == 1 or not _may_be_of_texts(refused) or await self._refuses_everything():
                return [Completion.failed(request.id, *refused.failure) for request in requests]
        return await self._ask_halves(requests)

    async def _ask_halves(self, requests: Sequence[Request]) -> list[Completion]:
        done: list[Completion] = []
        middle = len(requests) // 2
        for half in (requests[:middle], requests[middle:]):
            try:
                done += await self._ask(half)
            except Refused as refused:
                if len(half) == 1 or not _may_be_of_texts(refused):
                    done += [Completion.failed(request.id, *refused.failure) for request in half]
                else:
                    done += await self._ask_halves(half)
        return done

    async def _refuses_everything(self) -> bool:
        try:
            await self._server.embed(self._body([_HARMLESS]), 1, 1)
        except Refused:
            return True
        return False

    async def _ask(self, requests: Sequence[Request]) -> list[Completion]:
        lengths = [self.cost(request) for request in requests]
        body = self._body([unpack(request.prompt) for request in requests])
        reply = await self._server.embed(body, len(requests), sum(lengths))
        with np.errstate(over="ignore"):  # what is beyond float32 is found not to be finite
            vectors = np.array([vector.embedding for vector in reply.data], np.float32)
        return [
            Completion.failed(request.id, "LLM_BACKEND_ANSWER_UNUSABLE", {"reason": "its vector is not finite"})
            if text is None
            else Completion(request.id, [], FinishReason.STOP, tokens, 0, tokens, text=text)
            for request, text, tokens in zip(requests, json_vectors(vectors), _shares(reply, lengths), strict=True)
        ]

    def _body(self, texts: Sequence[bytes]) -> bytes:
        """texts: as JSON."""
        return msgspec.json.encode({"model": self._model, "input": [msgspec.Raw(text) for text in texts]})


def _may_be_of_texts(refused: Refused) -> bool:
    return refused.failure[1].get("status") in _OF_ITS_TEXTS


def _shares(reply: VectorReply, lengths: Sequence[int]) -> list[int]:
    """Each text's tokens: of the whole request's, which is all that servers tell, by their lengths."""
    if reply.usage is None:
        return list(lengths)
    ends = np.cumsum(lengths) * reply.usage.prompt_tokens // max(1, sum(lengths))
    shares: list[int] = np.diff(ends, prepend=0).tolist()
    return shares
