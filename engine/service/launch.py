"""Finds the engine of this executor and spec, or starts it: one at a time, under a file lock, by exec."""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

import spark_llm
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service import folder as folders
from spark_llm.engine.service import process
from spark_llm.engine.service.folder import EngineFolder, EngineState
from spark_llm.engine.service.probe import probe
from spark_llm.engine.service.process import ProcessId
from spark_llm.engine.service.room import make_room
from spark_llm.errors import LlmError

MAIN = "spark_llm.engine.service.main"
HUNG_SECONDS = 30.0  # an engine that lives but does not say so for this long is ended
_LOOK_SECONDS = 0.05  # between two looks at an engine that starts; its end is noticed at once
_children: list[subprocess.Popen[bytes]] = []  # kept so that engines that end do not stay zombies


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a launcher tells the engine process it starts: the single argument of ``main``, as JSON."""

    spec: EngineSpec
    owner: ProcessId
    folder: str
    socket: str


def ensure(spec: EngineSpec, start_timeout: float) -> EngineState:
    """The engine of this process's owner and ``spec``, alive and answering; started if need be.

    Raises LLM_ENGINE_START_FAILED, or the very error with which the engine refused to start (for example
    LLM_MODEL_NOT_FOUND). Those who wait while a start fails get its error too, later callers start anew.
    """
    owner = process.owner()
    folder = folders.engine_folder(owner, spec.key)
    asked_at = time.monotonic()
    with _locked(folder, spec, start_timeout):
        failure = folder.failure()
        if failure is not None and failure.at >= asked_at:
            raise failure.error()
        deadline = time.monotonic() + start_timeout
        state = folder.state()
        if state is not None and _answers(state, deadline):
            return state
        folders.sweep()
        folder = folders.engine_folder(owner, spec.key)  # the engine that ended has taken its folder along
        try:
            return _start(spec, owner, folder, deadline, start_timeout)
        except LlmError as error:
            if error.condition != "LLM_NO_MEMORY":
                raise
            ended, busy = make_room(folder)
            if ended:
                return _start(spec, owner, folder, deadline, start_timeout)
            if busy:
                shared = error.parameters | {"model": spec.model, "others": ", ".join(busy)}
                raise LlmError("LLM_NO_MEMORY_BESIDE", **shared) from error
            raise


def _start(
    spec: EngineSpec, owner: ProcessId, folder: EngineFolder, deadline: float, start_timeout: float
) -> EngineState:
    folder.forget_failure()
    state = _spawn(Order(spec=spec, owner=owner, folder=str(folder.path), socket=folder.new_socket()))
    _await_ready(state, folder, deadline, start_timeout)
    return state


@contextlib.contextmanager
def _locked(folder: EngineFolder, spec: EngineSpec, start_timeout: float) -> Iterator[None]:
    # whoever holds the lock may itself wait out a hung engine and then the whole start
    lock = FileLock(folder.lock, timeout=start_timeout + 2 * HUNG_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        reason = f"another task has been starting it for {start_timeout:g} s"
        raise _start_failed(spec.model, reason, folder, folder.log_size()) from error
    try:
        yield
    finally:
        lock.release()


def _answers(state: EngineState, deadline: float) -> bool:
    """True once the engine of ``state`` answers, False if it has ended; one that hangs is ended.

    It may still be loading: whoever started it can have been killed before it was ready.
    """
    with process.watching(state.process) as watch:
        hung_at = time.monotonic() + HUNG_SECONDS
        while not watch.wait(0):
            if probe(state.socket, timeout=HUNG_SECONDS) is not None:
                return True
            loading = not os.path.exists(state.socket)
            if time.monotonic() > (deadline if loading else hung_at):
                _end(state.process)
                return False
            watch.wait(_LOOK_SECONDS)
    return False


def _spawn(order: Order) -> EngineState:
    folder = EngineFolder(Path(order.folder))
    offset = folder.log_size()
    if not sys.executable:
        raise _start_failed(order.spec.model, "sys.executable is empty: no Python to run it with", folder, offset)
    command = [sys.executable, "-P", "-m", MAIN, msgspec.json.encode(order).decode()]
    _children[:] = [child for child in _children if child.poll() is None]
    try:
        with open(os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            # no new session: the signal that ends Spark's process group must reach the engine
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(order.spec)
            )
    except OSError as error:
        raise _start_failed(order.spec.model, str(error), folder, offset) from error
    _children.append(child)
    started = ProcessId.of(child.pid) or ProcessId(child.pid, 0)
    state = EngineState(process=started, socket=order.socket, model=order.spec.model, log_offset=offset)
    folder.write_state(state)
    return state


def _await_ready(state: EngineState, folder: EngineFolder, deadline: float, start_timeout: float) -> None:
    with process.watching(state.process) as watch:
        while not watch.wait(_LOOK_SECONDS):
            if os.path.exists(state.socket) and probe(state.socket, timeout=HUNG_SECONDS) is not None:
                return
            if time.monotonic() > deadline:
                _end(state.process)
                reason = f"it was not ready after {start_timeout:g} s"
                break
        else:
            code = next((child.poll() for child in _children if child.pid == state.process.pid), None)
            reason = "its process ended" if code is None else f"its process ended with {_exit_text(code)}"
    failure = folder.failure()
    error = failure.error() if failure is not None else _start_failed(state.model, reason, folder, state.log_offset)
    folder.write_failure(folders.Failure.of(error))  # for those who wait; dated now, after they began to wait
    raise error


def _end(process_id: ProcessId) -> None:
    with process.watching(process_id) as watch:
        if not watch.wait(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id.pid, signal.SIGKILL)
            watch.wait(10.0)


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    text = f"signal {signal.Signals(-code).name}"
    return f"{text} (out of memory?)" if code == -signal.SIGKILL else text


def _start_failed(model: str, reason: str, folder: EngineFolder, offset: int) -> LlmError:
    tail = folder.log_tail(offset)
    return LlmError("LLM_ENGINE_START_FAILED", model=model, reason=reason, log=folder.log, tail=tail)


def _environment(spec: EngineSpec) -> dict[str, str]:
    """The environment of the engine: this process's, with its import path and its own number of threads.

    Spark sets OMP_NUM_THREADS to the cores of one task; the engine serves all tasks of the executor.
    """
    hidden = ("PYTHON_WORKER_FACTORY_",)  # the secret and the address of Spark's worker
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    threads = str(spec.threads or process.usable_cores())
    environment.update(
        PYTHONPATH=os.pathsep.join(_import_path()),
        PYTHONUNBUFFERED="1",
        OMP_NUM_THREADS=threads,
        OMP_WAIT_POLICY="passive",
        RAYON_NUM_THREADS=threads,
    )
    return environment


def _import_path() -> list[str]:
    """The import path of this process, so that the engine finds what the task found (``--py-files``, archives).

    Without the current folder, whose files could shadow modules, unless spark_llm itself comes from there.
    """
    here = os.getcwd()
    path = [entry for entry in map(os.path.abspath, filter(None, sys.path)) if entry != here]
    if importlib.machinery.PathFinder.find_spec("spark_llm", path) is None:
        path.append(str(Path(spark_llm.__file__).parents[1]))
    return path
