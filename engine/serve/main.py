"""Loads a model and serves it over HTTP until a signal ends the process: ``spark-llm serve``."""

from __future__ import annotations

import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.core import Engine
from spark_llm.engine.encoder.engine import EncoderEngine
from spark_llm.engine.encoder.load import load_encoder
from spark_llm.engine.loading import load_engine
from spark_llm.engine.serve.answering import Answers
from spark_llm.engine.serve.app import Server
from spark_llm.engine.serve.base import BaseServer
from spark_llm.engine.serve.embedding import EmbeddingServer
from spark_llm.engine.serve.keys import ApiKeys
from spark_llm.engine.service.loop import EngineLoop
from spark_llm.errors import LlmError

log = logging.getLogger("serve")

_GRACE_SECONDS = 10  # for requests that are under way when the process is asked to end


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where the server listens, port 0: on any that is free; who may come in; and what the model is called."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    name: str = ""


def serve(spec: EngineSpec, options: ServeOptions) -> None:
    """Serves until a signal comes. Raises LlmError: the model, its device, its memory or the address is not there."""
    keys = ApiKeys(options.key_file)
    keys.check_host(options.host)
    listener = _listen(options)
    engine, server = _server(spec, options, keys)
    name = server.name
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    # the socket takes connections in already: who reads this line can ask
    sys.stdout.write(f"serving {name} ({engine.dtype}) at http://{address}:{port}/v1\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=_GRACE_SECONDS,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _server(spec: EngineSpec, options: ServeOptions, keys: ApiKeys) -> tuple[Engine | EncoderEngine, BaseServer]:
    engine = load_encoder(spec) if spec.task == "embed" else load_engine(spec)
    loop = EngineLoop(engine, _end)
    loop.start()
    names = (options.name or engine.model_config.name, "default")
    if isinstance(engine, EncoderEngine):
        return engine, EmbeddingServer(loop, engine.text, engine.width, names, keys)
    assert engine.text is not None
    return engine, Server(Answers(loop, engine.text, engine.context_length), names, keys)


def _listen(options: ServeOptions) -> socket.socket:
    """Before the model is loaded: a port that is taken is told at once."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
        listener.listen(2048)
    except OSError as error:
        expected = f"an address that is free ({error.strerror})"
        raise LlmError(
            "LLM_INVALID_ARGUMENT",
            argument="--host, --port",
            value=f"{options.host}:{options.port}",
            expected=expected,
        ) from error
    return listener


def _end(error: BaseException) -> None:
    """The engine cannot go on: neither can the server."""
    log.critical("the engine failed: %s: %s", type(error).__name__, error)
    os._exit(1)
