"""What the server's routes share of HTTP: bodies in, JSON and events out, failures, clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from spark_llm.engine.request import Completion
from spark_llm.engine.serve.api import ApiError
from spark_llm.errors import LlmError

log = logging.getLogger("serve")

MOST_BYTES = 32 << 20  # of a request's body
_REFUSED = frozenset(
    {
        "LLM_ANSWER_INCOMPLETE",
        "LLM_CHAT_TEMPLATE_INVALID",
        "LLM_CONSTRAINT_FAILED",
        "LLM_CONTEXT_LENGTH_EXCEEDED",
        "LLM_INVALID_CONSTRAINT",
        "LLM_INVALID_REQUEST",
    }
)  # what is wrong with the request, not with the server
_T = TypeVar("_T")


def checked(completion: Completion) -> Completion:
    if completion.error is not None:
        condition, parameters = completion.error
        raise LlmError(condition, **parameters)
    return completion


def as_api_error(error: LlmError) -> ApiError:
    if error.condition in _REFUSED:
        code = error.condition.removeprefix("LLM_").lower()
        return ApiError(400, str(error), code=code)
    log.error("%s", error)
    return ApiError(500, str(error), code=error.condition.removeprefix("LLM_").lower(), kind="server_error")


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which is cancelled when the client goes away; then ClientDisconnect is raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.create_task(work), asyncio.create_task(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_body(request: Request) -> bytes:
    """Raises ApiError for a body that is too long, or one that a page of another site could have sent."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The Content-Type must be application/json")
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MOST_BYTES:
            raise ApiError(413, f"The body has more than {MOST_BYTES} bytes")
    return bytes(found)


async def http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return json_response(ApiError(error.status_code, message).body, error.status_code, dict(error.headers or {}))


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
