"""How a task's counters reach the driver while it runs: a line of JSON over TCP, acknowledged.

Spark's accumulators alone would not do: they arrive when a task ends, and never when Spark stops reading
early, as in every ``show()`` and ``LIMIT``. Here the driver knows a row's counts before Spark gets the row.
Where an executor cannot reach the driver, the accumulator still brings the counts of tasks that end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import threading
from typing import NamedTuple

import msgspec

from spark_llm.tally import Tally, TaskUpdate

_log = logging.getLogger("spark_llm.backchannel")

CONNECT_SECONDS = 2.0
ACKNOWLEDGE_SECONDS = 5.0
MAX_LINE = 1 << 20


class Address(NamedTuple):
    """Where a Listener is, and the key that it asks for."""

    host: str
    port: int
    key: str


class Listener:
    """The driver's end: a thread that merges all tasks' updates into a tally until ``close``.

    ``bind`` is the address to listen on, ``host`` the name under which tasks reach it.
    """

    def __init__(self, tally: Tally, bind: str = "127.0.0.1", host: str = "127.0.0.1") -> None:
        self._tally = tally
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._sockets = socket.create_server((bind, 0), family=_family(bind))
        self.address = Address(host, self._sockets.getsockname()[1], secrets.token_hex(16))
        self.thread = threading.Thread(target=self._run, name="spark-llm-backchannel", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop listening; tasks that are connected carry on without."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen())

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._sockets, limit=MAX_LINE)
        try:
            await self._stop.wait()
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = None
        try:
            key = await asyncio.wait_for(reader.readline(), ACKNOWLEDGE_SECONDS)
            if not hmac.compare_digest(key.strip(), self.address.key.encode()):
                _log.warning("Turned away a connection from %s without the key", writer.get_extra_info("peername"))
                return
            async for line in reader:
                update = msgspec.json.decode(line, type=TaskUpdate)
                self._tally.merge(update)
                if task is None:
                    task = update.task
                    self._tally.connected(update)
                writer.write(b"\n")
        except (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            _log.debug("A task's counters broke off: %s", error)
        finally:
            if task is not None:
                self._tally.gone(task)
            writer.close()


_unreachable: set[Address] = set()  # of this worker process, so that each tries once


class Sender:
    """A task's end. Never raises and never takes long: counters must not cost a query."""

    def __init__(self, address: Address | None) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def send(self, update: TaskUpdate) -> None:
        """Hand an update over; on return the driver has it, or cannot be reached."""
        if self._address is None or self._address in _unreachable:
            return
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address[:2], CONNECT_SECONDS)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.settimeout(ACKNOWLEDGE_SECONDS)
                self._socket.sendall(self._address.key.encode() + b"\n")
            self._socket.sendall(msgspec.json.encode(update) + b"\n")
            if not self._socket.recv(1):
                raise ConnectionResetError("the driver closed the connection")
        except OSError as error:
            _log.info("Counters reach the driver at the task's end only: %s", error)
            _unreachable.add(self._address)
            self.close()

    def close(self) -> None:
        """Let the driver know that this task is over."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _family(bind: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in bind else socket.AF_INET
