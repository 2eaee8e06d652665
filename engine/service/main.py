"""The engine process: loads the model, then serves it until its owner ends. Started by ``launch`` with one argument."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service.folder import EngineFolder, Failure
from spark_llm.engine.service.launch import Order
from spark_llm.engine.service.watch import Life
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.backend.engine import RemoteEngine
    from spark_llm.engine.core import Engine
    from spark_llm.engine.encoder.engine import EncoderEngine

log = logging.getLogger("main")

# stream threads must not make the engine's thread wait for the interpreter lock for the usual 5 ms
_SWITCH_SECONDS = 0.0005
_FLUSH_SECONDS = 5.0  # for writing the last answers to the result cache when the process ends


def load_engine(spec: EngineSpec) -> Engine | EncoderEngine | RemoteEngine:
    """The engine of ``spec``, or the server that answers in its place. Raises LlmError."""
    if spec.backend is not None:
        from spark_llm.engine.backend.engine import RemoteEngine

        return RemoteEngine(spec)
    if spec.task == "embed":
        from spark_llm.engine.encoder.load import load_encoder

        return load_encoder(spec)
    from spark_llm.engine import loading  # imports torch: after the watch over the owner has begun

    return loading.load_engine(spec)


def main(load: Callable[[EngineSpec], Engine | EncoderEngine | RemoteEngine] = load_engine) -> NoReturn:
    """Runs the process to its end; never returns. ``load`` makes the engine."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    folder = EngineFolder(Path(order.folder))
    life = Life(folder, order.owner, order.socket)
    life.handle_signals()
    life.watch_owner()
    log.info("engine pid=%d owner=%d spec=%s", os.getpid(), order.owner.pid, order.spec)
    _lift_limits()
    try:
        _serve(order, load, life)
    except LlmError as error:
        folder.write_failure(Failure.of(error))
        log.error("%s", error)
        life.end("it cannot start", code=2)
    except BaseException:
        log.exception("the engine failed")
        life.end("it failed", code=1)


def _serve(order: Order, load: Callable[[EngineSpec], Engine | EncoderEngine | RemoteEngine], life: Life) -> NoReturn:
    begun = time.monotonic()
    engine = load(order.spec)
    from spark_llm.engine.service.loop import EngineLoop
    from spark_llm.engine.service.server import EngineServer

    assert engine.text is not None, "an engine that serves has a tokenizer"
    sys.setswitchinterval(_SWITCH_SECONDS)
    loop = EngineLoop(
        engine,
        on_fatal=lambda error: life.end(f"{type(error).__name__}: {error}", code=1),
        fingerprint=lambda: _fingerprint(order.spec, engine),
    )
    life.before_end = lambda: loop.results.flush(_FLUSH_SECONDS)
    if order.spec.backend is not None:
        from spark_llm.engine.backend.engine import RemoteEngine

        assert isinstance(engine, RemoteEngine)
        engine.on_answers = loop.wake
    # What is loaded stays: a full collection over torch's objects, in the middle of a step, takes a tenth of a second.
    gc.collect()
    gc.freeze()
    loop.start()
    # the server is reachable from here on: an engine that answers is ready
    with EngineServer(order.socket, loop, engine.text, order.owner.pid, end=lambda: life.end("shutdown action")):
        seconds = time.monotonic() - begun
        log.info("ready after %.1f s: %s %s", seconds, engine.model_config.name, engine.dtype)
        life.stay(loop.idle_seconds, order.spec.idle_timeout)


def _fingerprint(spec: EngineSpec, engine: Engine | EncoderEngine | RemoteEngine) -> str:
    if spec.backend is not None:
        from spark_llm.engine.backend.text import fingerprint_of

        return fingerprint_of(spec.backend.url, engine.model_config.name, spec.task)
    from spark_llm.engine.model.fingerprint import fingerprint
    from spark_llm.engine.model.source import resolve

    source = resolve(spec.model, spec.task)
    if spec.task == "embed":
        from spark_llm.engine.encoder.engine import EncoderEngine

        assert isinstance(engine, EncoderEngine)
        return fingerprint(source, engine.identity)
    return fingerprint(source, engine.dtype)


def _lift_limits() -> None:
    """Takes back what ``spark.executor.pyspark.memory`` set for the worker that started this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if hard != resource.RLIM_INFINITY:
        log.warning(
            "the address space is limited to %.1f GB (spark.executor.pyspark.memory or ulimit -v): "
            "loading fails if the model needs more",
            hard / 1e9,
        )


if __name__ == "__main__":
    main()
