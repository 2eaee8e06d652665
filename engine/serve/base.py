"""What every HTTP server has, whatever its model does: who may ask, which model it is, counts and failures."""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from spark_llm.engine.serve import metrics
from spark_llm.engine.serve.api import ApiError
from spark_llm.engine.serve.keys import ApiKeys
from spark_llm.engine.serve.users import Users
from spark_llm.engine.serve.web import as_api_error, http_error, json_response
from spark_llm.engine.service.protocol import EngineStatus
from spark_llm.errors import LlmError

log = logging.getLogger("serve")

_CLOSED = 499  # the client went away: nobody reads the response
_Handler = Callable[[Request], Awaitable[Response]]


class BaseServer(ABC):
    """Answers HTTP requests of clients that hold one of ``keys``. names: of the model, the first is the one told.

    The routes are the same for every task, so that who asks the wrong server is told what it does.
    """

    def __init__(self, status: Callable[[int], EngineStatus], names: tuple[str, ...], keys: ApiKeys) -> None:
        self._status = status
        self._names = names
        self._keys = keys
        self._users = Users()
        self._created = int(time.time())
        self._responses: Counter[tuple[str, int]] = Counter()
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
                Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
                Route("/v1/embeddings", self._counted(self._embeddings), methods=["POST"]),
                Route("/v1/models", self._counted(self._models)),
                Route("/v1/models/{name:path}", self._counted(self._model)),
                Route("/metrics", self._metrics),
                Route("/health", self._health),
            ],
            exception_handlers={HTTPException: http_error},
        )

    @property
    def name(self) -> str:
        """What clients are told that the model is called."""
        return self._names[0]

    # ---- routes

    @abstractmethod
    async def _chat(self, request: Request) -> Response: ...

    @abstractmethod
    async def _completions(self, request: Request) -> Response: ...

    @abstractmethod
    async def _embeddings(self, request: Request) -> Response: ...

    async def _models(self, request: Request) -> Response:
        self._client(request)
        return json_response({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._client(request)
        self._check_model(request.path_params["name"])
        return json_response(self._description())

    async def _metrics(self, request: Request) -> Response:
        return Response(
            metrics.render(self._status(os.getpid()), self._responses),
            headers={"Content-Type": metrics.CONTENT_TYPE},
        )

    async def _health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    # ---- what they share

    def _counted(self, handler: _Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """``handler`` with failures as the protocol tells them, and its responses counted."""

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except ApiError as error:
                headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
                response = json_response(error.body, error.status, headers)
            except LlmError as error:
                refusal = as_api_error(error)
                response = json_response(refusal.body, refusal.status)
            except ClientDisconnect:
                response = Response(status_code=_CLOSED)
            except Exception:
                log.exception("a request failed")
                failure = ApiError(500, "The server failed; its log has the traceback", kind="server_error")
                response = json_response(failure.body, 500)
            self._responses[request.scope["route"].path, response.status_code] += 1
            return response

        return handle

    def _client(self, request: Request) -> str:
        """Who asks. Raises ApiError."""
        if not self._keys.reached_as(request.headers.get("host", "")):
            raise ApiError(403, "Without API keys the server answers to 127.0.0.1 and localhost only")
        holder = self._keys.holder(request.headers.get("authorization", ""))
        if holder is None:
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        return holder

    def _description(self) -> dict[str, object]:
        return {"id": self._names[0], "object": "model", "created": self._created, "owned_by": "spark-llm"}

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            message = f"The model `{name}` does not exist; this server has `{self._names[0]}`"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _other_task(self, request: Request, does: str) -> ApiError:
        """For who asks what this model does not do."""
        self._client(request)
        message = f"The model `{self._names[0]}` {does}: ask a server of another model for {request.url.path}"
        return ApiError(400, message, code="model_task_mismatch")
