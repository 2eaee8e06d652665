"""The coordinator's socket: a thread of the driver's Python process that engines and tasks connect to."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import threading

import msgspec

from spark_llm.engine.service.coordinator import Coordinator, Cost
from spark_llm.engine.service.coordinator_protocol import (
    BEAT_SECONDS,
    MAX_LINE,
    Beat,
    Cluster,
    Dispatch,
    Finished,
    FromEngine,
    FromTask,
    Hello,
    Lost,
    Register,
    Registered,
    Subscribe,
    Tls,
    WindowAsk,
    line,
)

log = logging.getLogger("spark_llm.coordinator")

_HELLO_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_HELLO_BYTES = 4096


class _Peer:
    """A connection from the coordinator's side."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def push(self, message: msgspec.Struct) -> None:
        if not self._writer.is_closing():
            self._writer.write(line(message))


class CoordinatorServer:
    """Serves a Coordinator until ``close``. ``cluster`` is what engines and tasks need to reach it.

    ``bind`` is the address to listen on, ``host`` the one by which executors reach it. Raises OSError.
    """

    def __init__(self, bind: str = "127.0.0.1", host: str = "127.0.0.1", tls: Tls | None = None) -> None:
        self._tls = None if tls is None else tls.server()
        self._coordinator = Coordinator()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # connections by who serves them
        family = socket.AF_INET6 if ":" in bind else socket.AF_INET
        self._socket = socket.create_server((bind, 0), family=family, backlog=1024)
        self.cluster = Cluster(host=host, port=self._socket.getsockname()[1], key=secrets.token_hex(32), tls=tls)
        self._thread = threading.Thread(target=self._run, name="spark-llm-coordinator", daemon=True)
        self._thread.start()

    @property
    def cost(self) -> Cost:
        """What dispatching has cost so far."""
        return self._coordinator.cost

    def close(self) -> None:
        """Stop listening and hang up; engines and tasks go on by themselves."""
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5.0)
        cost = self.cost
        if cost.requests:
            micros = 1e6 * cost.seconds / cost.groups
            log.info("dispatched %d rows in %d groups, %.0f us a group", cost.rows, cost.groups, micros)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen())

    async def _listen(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._socket, ssl=self._tls, limit=MAX_LINE)
        looking = asyncio.create_task(self._look())
        try:
            await self._stop.wait()
        finally:
            server.close()
            looking.cancel()
            for writer in self._open.values():
                writer.close()
            if self._open:
                await asyncio.wait(self._open, timeout=_CLOSE_SECONDS)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            self._coordinator.look()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer, task = _Peer(writer), asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        try:
            hello = await asyncio.wait_for(self._hello(reader), _HELLO_SECONDS)
            if hello is None:
                log.warning("turned away a connection from %s without the key", writer.get_extra_info("peername"))
            elif hello.role == "engine":
                await self._serve_engine(reader, peer)
            else:
                await self._serve_task(reader, peer)
        except (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            log.info("a connection broke off: %s", error)
        finally:
            del self._open[task]
            writer.close()

    async def _hello(self, reader: asyncio.StreamReader) -> Hello | None:
        text = await reader.readline()
        try:
            hello = msgspec.json.decode(text[:_HELLO_BYTES], type=Hello)
        except msgspec.MsgspecError:
            return None
        return hello if hmac.compare_digest(hello.key.encode(), self.cluster.key.encode()) else None

    async def _serve_engine(self, reader: asyncio.StreamReader, peer: _Peer) -> None:
        decoder, engine = msgspec.json.Decoder(FromEngine), None
        try:
            async for text in reader:
                match decoder.decode(text):
                    case Register() as told:
                        engine = told.engine
                        self._coordinator.register(told, peer)
                        peer.push(Registered())
                    case Beat() as beat if engine is not None:
                        self._coordinator.beat(engine, beat)
        finally:
            if engine is not None:
                self._coordinator.engine_gone(engine, peer)

    async def _serve_task(self, reader: asyncio.StreamReader, peer: _Peer) -> None:
        decoder, coordinator = msgspec.json.Decoder(FromTask), self._coordinator
        coordinator.task_came(peer)
        try:
            async for text in reader:
                match decoder.decode(text):
                    case Subscribe() as asked:
                        peer.push(coordinator.subscribe(asked, peer))
                    case Dispatch() as asked:
                        peer.push(coordinator.dispatch(asked, peer))
                    case WindowAsk() as asked:
                        peer.push(coordinator.window(asked, peer))
                    case Finished() as told:
                        coordinator.finished(told, peer)
                    case Lost() as told:
                        coordinator.lost(told)
        finally:
            coordinator.task_gone(peer)
