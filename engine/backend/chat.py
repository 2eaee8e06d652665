"""Asks a server's chat completions: a request a row."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from spark_llm.engine.backend.connection import Connection, Refused, Reply
from spark_llm.engine.backend.form import AnswerFormat, WrongAnswer
from spark_llm.engine.backend.text import MessageText, pack, unpack
from spark_llm.engine.backend.turns import asked_tokens
from spark_llm.engine.request import Completion, FinishReason, Request


class Chat:
    """Rows as conversations with the model ``model``; see Asker."""

    most_rows = 1

    def __init__(self, server: Connection, model: str) -> None:
        self.text = MessageText()
        self._server = server
        self._model = model
        self._max_tokens_name = "max_tokens"

    def cost(self, request: Request) -> int:
        """Tokens that a row may take."""
        return asked_tokens(request)

    async def ask(self, requests: Sequence[Request]) -> list[Completion]:
        """The answer of the one request. Raises Refused."""
        (request,) = requests
        tokens = self.cost(request)
        try:
            reply = await self._server.complete(self._body(request), tokens)
        except Refused as refused:
            # newer models of OpenAI know the limit by another name, and say so
            reason = refused.failure[1]["reason"]
            if self._max_tokens_name == "max_completion_tokens" or "max_completion_tokens" not in reason:
                raise
            self._max_tokens_name = "max_completion_tokens"
            reply = await self._server.complete(self._body(request), tokens)
        return [completion_of(request, reply)]

    def _body(self, request: Request) -> bytes:
        params = request.params
        body: dict[str, object] = {
            "model": self._model,
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


def completion_of(request: Request, reply: Reply) -> Completion:
    """What a reply says of its row."""
    choice, usage = reply.choices[0], reply.usage
    text = choice.message.content
    if choice.finish_reason not in ("stop", "length", None) or text is None:
        reason = choice.message.refusal or f"it ended the answer for the reason {choice.finish_reason!r}"
        return Completion.failed(request.id, "LLM_BACKEND_ANSWER_UNUSABLE", {"reason": reason})
    is_cut = choice.finish_reason == "length"
    if isinstance(request.constraint, AnswerFormat):
        if is_cut:
            parameters = {"kind": request.constraint.kind, "max_tokens": str(request.params.max_tokens)}
            return Completion.failed(request.id, "LLM_ANSWER_INCOMPLETE", parameters)
        try:
            text = request.constraint.read(text)
        except WrongAnswer as error:
            return Completion.failed(request.id, "LLM_BACKEND_ANSWER_UNUSABLE", {"reason": str(error)})
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
