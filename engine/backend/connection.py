"""Requests to a server of OpenAI's protocol: sent again where that can help, refused with the server's own words."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import random
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import msgspec

from spark_llm.engine.backend.api_key import ApiKey
from spark_llm.engine.backend.rates import Clock, Limits
from spark_llm.engine.config import BackendSpec
from spark_llm.errors import LlmError

log = logging.getLogger("backend")

FIRST_DELAY = 0.5  # seconds before a request is sent again; doubled each time, and each time drawn below that
LONGEST_DELAY = 30.0
LONGEST_PAUSE = 600.0  # that a server may ask for
_WORDS = 400  # characters of a server's message in errors
_PASSING = frozenset({408, 409, 425, 429})  # and all of 5xx
_OVERLOADED = frozenset({429, 503})  # means all requests, not this one

_T = TypeVar("_T")
Failure = tuple[str, dict[str, str]]  # condition and parameters of LlmError


class Refused(Exception):
    """A request failed for good."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure[0])


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """What a request cost, in the server's tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Of the prompt's tokens."""
        details = self.prompt_tokens_details
        return min(self.prompt_tokens, (details.cached_tokens or 0) if details else 0)


class Message(msgspec.Struct, frozen=True):
    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct, frozen=True):
    message: Message
    finish_reason: str | None = None


class Reply(msgspec.Struct, frozen=True):
    """Of ``/chat/completions``, what is used of it."""

    choices: list[Choice]
    usage: Usage | None = None


class Vector(msgspec.Struct, frozen=True):
    """index: of its text in the request."""

    index: int
    embedding: list[float]


class VectorReply(msgspec.Struct, frozen=True):
    """Of ``/embeddings``, what is used of it."""

    data: list[Vector]
    usage: Usage | None = None


@dataclass(slots=True)
class Counters:
    """requests: sent. retries: of these, for a row that had been sent before. throttled: refused with 429 or 503."""

    requests: int = 0
    retries: int = 0
    throttled: int = 0


@dataclass
class Connection:
    """The server of ``spec``; for one event loop. Close it. Raises LLM_BACKEND_KEY_MISSING.

    transport: in place of the network.
    """

    spec: BackendSpec
    transport: httpx2.AsyncBaseTransport | None = None
    clock: Clock = field(default_factory=Clock)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        spec = self.spec
        self._key = ApiKey(spec)
        self.limits = Limits(spec.rpm, spec.tpm, self.clock)
        self._client = httpx2.AsyncClient(
            transport=self.transport,
            timeout=httpx2.Timeout(spec.timeout, connect=min(30.0, spec.timeout)),
            limits=httpx2.Limits(max_connections=spec.concurrency, max_keepalive_connections=spec.concurrency),
        )
        self._is_down = False  # a row was given up and none has been answered since: others are not tried as often
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # else a line for every row

    async def close(self) -> None:
        await self._client.aclose()

    async def models(self) -> list[str]:
        """The models that the server lists; none where it does not say. Raises LlmError: it cannot be asked at all."""
        try:
            response = await self._answer("GET", "/models", b"", 0)
            found = msgspec.json.decode(response.content, type=dict[str, msgspec.Raw])
            listed = msgspec.json.decode(found.get("data", b"[]"), type=list[dict[str, Any]])
        except Refused as refused:
            condition, parameters = refused.failure
            if condition == "LLM_BACKEND_REFUSED" and parameters["status"] not in ("401", "403"):
                return []
            raise LlmError(condition, **parameters) from refused
        except msgspec.MsgspecError:
            return []
        return [str(model["id"]) for model in listed if "id" in model]

    async def complete(self, body: bytes, tokens: float) -> Reply:
        """The reply to a request of ``/chat/completions``, which takes about ``tokens`` tokens. Raises Refused."""
        response, reply = await self._asked("/chat/completions", body, tokens, Reply)
        if not reply.choices:
            raise self._refused(response, "the reply has no answer")
        self._settle(tokens, reply.usage)
        return reply

    async def embed(self, body: bytes, texts: int, tokens: float) -> VectorReply:
        """The reply to a request of ``/embeddings`` for so many texts; vectors in their order. Raises Refused."""
        response, reply = await self._asked("/embeddings", body, tokens, VectorReply)
        found = sorted(reply.data, key=lambda vector: vector.index)
        if [vector.index for vector in found] != list(range(texts)) or len(
            {len(each.embedding) for each in found}
        ) != 1:
            raise self._refused(response, f"the reply does not have one vector for each of {texts} texts")
        self._settle(tokens, reply.usage)
        return VectorReply(found, reply.usage)

    async def _asked(self, path: str, body: bytes, tokens: float, kind: type[_T]) -> tuple[httpx2.Response, _T]:
        response = await self._answer("POST", path, body, tokens)
        try:
            return response, msgspec.json.decode(response.content, type=kind)
        except msgspec.MsgspecError as error:
            raise self._refused(response, f"the reply cannot be read: {error}") from error

    def _settle(self, estimated: float, usage: Usage | None) -> None:
        if usage is not None:
            self.limits.settle(estimated, usage.prompt_tokens + usage.completion_tokens)

    async def _answer(self, method: str, path: str, body: bytes, tokens: float) -> httpx2.Response:
        """The response with a status of 2xx; waits for the limits, and sends again what failed in passing."""
        attempt = 0
        while True:
            await self.limits.admit(tokens)
            self.counters.requests += 1
            self.counters.retries += attempt > 0
            response = None
            try:
                headers = {"Content-Type": "application/json"} | self._key.header
                response = await self._client.request(method, self.spec.url + path, content=body, headers=headers)
                reason = ""
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if response is not None:
                if response.is_success:
                    self._is_down = False
                    return response
                reason = f"HTTP status {response.status_code}: {_words(response)}"
                if response.status_code == 401 and self._key.renew():
                    continue
                if not _may_pass(response):
                    raise self._refused(response, _words(response))
            attempt += 1
            if attempt > (0 if self._is_down else self.spec.retries):
                self._is_down = True
                parameters = {"url": self.spec.url, "times": str(attempt), "reason": reason}
                raise Refused(("LLM_BACKEND_UNAVAILABLE", parameters))
            await self._wait(attempt, response, reason)

    async def _wait(self, attempt: int, response: httpx2.Response | None, reason: str) -> None:
        asked = None if response is None else _retry_after(response)
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        if response is not None and response.status_code in _OVERLOADED:
            self.counters.throttled += 1
            self.limits.pause(delay if asked is None else asked)
        if attempt == 1:
            log.info("asked again: %s", reason)
        # those that were told to wait for the same time do not come back at the same moment
        await self.clock.sleep(delay if asked is None else asked + random.uniform(0.0, min(1.0, 0.1 * asked)))

    def _refused(self, response: httpx2.Response, reason: str) -> Refused:
        parameters = {"url": self.spec.url, "status": str(response.status_code), "reason": reason}
        return Refused(("LLM_BACKEND_REFUSED", parameters))


def _may_pass(response: httpx2.Response) -> bool:
    if response.status_code == 429 and "insufficient_quota" in response.text:
        return False  # an account without money
    return response.status_code in _PASSING or response.status_code >= 500


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, None if it does not say."""
    for name, seconds in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = response.headers.get(name, "")
        try:
            found = float(text) * seconds
        except ValueError:
            date = email.utils.parsedate_tz(text)
            if date is None:
                continue
            found = email.utils.mktime_tz(date) - time.time()
        return min(LONGEST_PAUSE, max(0.0, found))
    return None


def _words(response: httpx2.Response) -> str:
    """What the server says of a failure, in one line."""
    text = response.text
    with contextlib.suppress(msgspec.MsgspecError):
        found = msgspec.json.decode(response.content)
        error = found.get("error", found) if isinstance(found, dict) else found
        message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
        text = message if isinstance(message, str) else text
    return " ".join(text.split())[:_WORDS] or response.reason_phrase
