"""How the protocol's two routes word answers, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from spark_llm.engine.request import Completion, FinishReason


class Words(ABC):
    """How one of the routes says things; for one response."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def head(self) -> dict[str, object]:
        return {**self._head, "object": self.kind}

    def chunk_head(self) -> dict[str, object]:
        return {**self._head, "object": self.chunk_kind}

    @abstractmethod
    def choice(self, number: int, text: str, reason: str) -> dict[str, object]: ...

    def opening(self, number: int) -> dict[str, object] | None:
        return None

    @abstractmethod
    def delta(self, number: int, text: str, reason: str | None) -> dict[str, object]: ...


class ChatWords(Words):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, number: int, text: str, reason: str) -> dict[str, object]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": number, "message": message, "logprobs": None, "finish_reason": reason}

    def opening(self, number: int) -> dict[str, object] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def delta(self, number: int, text: str, reason: str | None) -> dict[str, object]:
        return {"index": number, "delta": {"content": text} if text else {}, "finish_reason": reason}


class CompletionWords(Words):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, number: int, text: str, reason: str) -> dict[str, object]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}

    def delta(self, number: int, text: str, reason: str | None) -> dict[str, object]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": reason}


def usage_of(ends: Sequence[Completion], per_prompt: int) -> dict[str, object]:
    """What the rows cost; a prompt that has several answers counts once."""
    prompt = sum(end.prompt_tokens for end in ends) // per_prompt
    output = sum(end.num_output for end in ends)
    cached = min(prompt, sum(end.cached_tokens for end in ends[::per_prompt]))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def finish_reason(completion: Completion) -> str:
    """In the protocol's words."""
    return "length" if completion.finish_reason is FinishReason.LENGTH else "stop"
