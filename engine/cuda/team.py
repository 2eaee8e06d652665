"""The processes that share a model's layers among GPUs: rank 0, the engine's own, starts the others by exec.

No rank outlives rank 0, and rank 0 computes nothing more once a rank is lost: its steps raise DeviceLostError, which
ends the engine; the next one answers the rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

import msgspec

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.cuda import channel
from spark_llm.engine.cuda.channel import LostError, Receiver, Sender
from spark_llm.engine.service import process
from spark_llm.engine.service.process import ProcessId
from spark_llm.errors import LlmError

log = logging.getLogger(__name__)

WORKER = "spark_llm.engine.cuda.worker"
_GRACE_SECONDS = 10.0  # in which the engine ends by itself after a rank was lost


class DeviceLostError(Exception):
    """The GPU or its context is gone (an illegal access, say), or another rank: nothing can be computed any more."""


class WorkerOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told: the single argument of ``worker``, as JSON.

    socket, slots, rendezvous: file descriptors that it inherits.
    """

    spec: EngineSpec
    rank: int
    size: int
    device: str
    parent: ProcessId
    socket: int
    slots: tuple[int, ...]
    rendezvous: int


class Peers(Protocol):
    """The other ranks, as seen by one of them, while a model is loaded."""

    rank: int
    size: int
    rendezvous: int

    def least(self, value: int) -> int:
        """The least of all ranks' values; returns when all have asked."""


class Team:
    """The other ranks as seen by rank 0. lost: set when one of them has ended."""

    rank = 0

    def __init__(
        self, spec: EngineSpec, devices: Sequence[str], command: Sequence[str] = (sys.executable, "-P", "-m", WORKER)
    ) -> None:
        """Starts a process for each of ``devices`` but the first, which is rank 0's."""
        self.size = len(devices)
        self.rendezvous = channel.memory("ranks")
        self.lost = threading.Event()
        self._closing = threading.Event()
        slots = tuple(channel.memory("steps") for _ in range(channel.SLOTS))
        self._inherited = (self.rendezvous, *slots)
        path = os.pathsep.join(filter(None, sys.path))  # they find what this process found
        environment = os.environ | {"PYTHONPATH": path}
        me = ProcessId.of(os.getpid())
        assert me is not None, "this process lives"
        self._sockets: list[socket.socket] = []
        self._children: list[subprocess.Popen[bytes]] = []
        for rank, device in enumerate(devices[1:], 1):
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            order = WorkerOrder(
                spec=spec, rank=rank, size=self.size, device=device, parent=me, socket=theirs.fileno(), slots=slots,
                rendezvous=self.rendezvous,
            )  # fmt: skip
            with theirs:
                child = subprocess.Popen(
                    [*command, msgspec.json.encode(order).decode()], stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *self._inherited), env=environment,
                )  # fmt: skip
            self._sockets.append(mine)
            self._children.append(child)
            threading.Thread(target=self._watch, args=(rank, child), name=f"rank {rank}", daemon=True).start()
        self._sender = Sender(self._sockets, slots)

    @property
    def pids(self) -> list[int]:
        """Of ranks 1 and up."""
        return [child.pid for child in self._children]

    def least(self, value: int) -> int:
        """See Peers. A rank that cannot go on tells why: its LlmError is raised here. DeviceLostError if it is gone."""
        try:
            answers = [msgspec.json.decode(channel.receive(connection)) for connection in self._sockets]
            for answer in answers:
                if isinstance(answer, dict):
                    raise LlmError(answer["condition"], **answer["parameters"])
            found = min(value, *answers)
            for connection in self._sockets:
                channel.send(connection, msgspec.json.encode(found))
        except LostError as error:
            raise self._gone(error) from error
        return int(found)

    def send(self, step: object) -> None:
        """Every rank is to run ``step``, too. DeviceLostError if one is gone."""
        try:
            self._sender.send(step)
        except LostError as error:
            raise self._gone(error) from error

    def close(self) -> None:
        """Ends the ranks."""
        self._closing.set()
        for connection in self._sockets:
            connection.close()
        for child in self._children:
            child.kill()
            child.wait()
        for fd in self._inherited:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _gone(self, error: LostError) -> DeviceLostError:
        codes = [f"rank {rank}: {child.poll()}" for rank, child in enumerate(self._children, 1)]
        return DeviceLostError(f"a rank of the engine has ended ({error}; exit codes: {', '.join(codes)})")

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if self._closing.is_set():
            return
        log.error("rank %d (process %d) has ended with %d", rank, child.pid, code)
        self.lost.set()
        # A thread that waits inside a library for a rank that is gone may wait for ever.
        if not self._closing.wait(_GRACE_SECONDS):
            log.error("the engine ends without rank %d", rank)
            logging.shutdown()
            os._exit(1)


class Seat:
    """Rank 0 as seen by another rank; ``order`` is what that was started with."""

    def __init__(self, order: WorkerOrder) -> None:
        self.rank = order.rank
        self.size = order.size
        self.rendezvous = order.rendezvous
        self._socket = socket.socket(fileno=order.socket)
        self.steps = Receiver(self._socket, order.slots)

    def least(self, value: int) -> int:
        """See Peers. LostError if rank 0 has ended."""
        channel.send(self._socket, msgspec.json.encode(value))
        return msgspec.json.decode(channel.receive(self._socket), type=int)

    def refuse(self, error: LlmError) -> None:
        """Tells rank 0, instead of the next value, why this rank cannot go on."""
        answer = {"condition": error.condition, "parameters": error.parameters}
        channel.send(self._socket, msgspec.json.encode(answer))


def end_with(parent: ProcessId) -> None:
    """From now on this process ends, at once, when ``parent`` does."""

    def wait() -> None:
        with process.watching(parent) as watch:
            while not watch.wait(3600.0):
                pass
        os._exit(0)  # no teardown: the main thread may be inside a library that waits for the parent

    threading.Thread(target=wait, name="parent", daemon=True).start()
