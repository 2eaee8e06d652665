"""An engine behind a real HTTP server and socket of this process, and what reached it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from spark_llm.engine.core import Engine
from spark_llm.engine.encoder.engine import EncoderEngine
from spark_llm.engine.request import Request
from spark_llm.engine.serve.base import BaseServer
from spark_llm.engine.service.loop import EngineLoop


@dataclass(frozen=True)
class Reached:
    """seen: the requests that the engine got."""

    loop: EngineLoop
    port: int
    seen: list[Request]


@contextmanager
def over_http(engine: Engine | EncoderEngine, make: Callable[[EngineLoop], BaseServer]) -> Iterator[Reached]:
    """make: the server over the engine's loop."""
    seen: list[Request] = []
    add = engine.add
    engine.add = lambda request: (seen.append(request), add(request))[1]  # type: ignore[method-assign, func-returns-value]
    fatal: list[BaseException] = []
    loop = EngineLoop(engine, fatal.append)
    loop.start()
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make(loop).app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    yield Reached(loop, listener.getsockname()[1], seen)
    server.should_exit = True
    thread.join(10)
    assert not fatal
