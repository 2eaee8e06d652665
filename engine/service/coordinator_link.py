"""One end of a connection to the coordinator, an engine's or a task's: messages out, replies and pushed messages in."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import msgspec

from spark_llm.engine.service.coordinator_protocol import MAX_LINE, Cluster, Hello, line

log = logging.getLogger("spark_llm.coordinator_link")

CONNECT_SECONDS = 10.0
ASK_SECONDS = 30.0


class Link:
    """Connected from construction on, until ``close`` or until the other side is gone; then ``on_end`` is called.

    on_push(message) gets what is no reply; both callbacks run in the link's own thread. words: the union of messages
    that may come. host: this side's address, by which the coordinator's host is reached.
    Raises OSError when the coordinator cannot be reached or shows the wrong certificate.
    """

    def __init__(
        self,
        cluster: Cluster,
        role: Any,
        words: Any,
        on_push: Callable[[Any], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_push = on_push
        self._on_end = on_end
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(words)
        self._lock = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self.host = ""
        self.is_open = False
        connected: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, args=(cluster, role, connected), name="link", daemon=True)
        self._thread.start()
        self.host = connected.result()

    def tell(self, message: msgspec.Struct) -> None:
        """Sends a message. Raises OSError when the link is known to have ended."""
        self._send(line(message))

    def ask(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Sends a message, which is made with a number of its own, and returns the reply with that number.

        Raises OSError when none comes.
        """
        number = next(self._numbers)
        reply: Future[Any] = Future()
        with self._lock:
            self._asked[number] = reply
        try:
            self._send(line(make(number)))
            return reply.result(ASK_SECONDS)
        except (TimeoutError, CancelledError) as error:
            raise ConnectionError("the coordinator does not answer") from error
        finally:
            with self._lock:
                self._asked.pop(number, None)

    def close(self) -> None:
        """Hangs up."""
        try:
            self._loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:  # the loop has ended already
            return
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _send(self, text: bytes) -> None:
        try:
            if not self.is_open:
                raise ConnectionError("the connection to the coordinator has ended")
            self._loop.call_soon_threadsafe(self._write, text)
        except RuntimeError as error:
            raise ConnectionError("the connection to the coordinator has ended") from error

    def _write(self, text: bytes) -> None:
        if self.is_open:
            self._writer.write(text)

    # ---- the link's thread

    def _run(self, cluster: Cluster, role: Any, connected: Future[str]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(cluster, role, connected))

    async def _serve(self, cluster: Cluster, role: Any, connected: Future[str]) -> None:
        try:
            tls = None if cluster.tls is None else cluster.tls.client()
            opening = asyncio.open_connection(cluster.host, cluster.port, ssl=tls, limit=MAX_LINE)
            reader, self._writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
            self._writer.write(line(Hello(cluster.key, role)))
        except BaseException as error:
            connected.set_exception(error if isinstance(error, OSError) else ConnectionError(str(error)))
            return
        self.is_open = True
        connected.set_result(self._writer.get_extra_info("sockname")[0])
        reading = asyncio.create_task(self._read(reader))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.is_open = False
            self._writer.close()
            reading.cancel()
            stopping.cancel()
            with self._lock:
                for reply in self._asked.values():
                    reply.cancel()
            if not self._stop.is_set():
                self._on_end()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            async for text in reader:
                message = self._decoder.decode(text)
                with self._lock:
                    reply = self._asked.get(getattr(message, "ask", -1))
                if reply is not None:
                    reply.set_result(message)
                else:
                    self._on_push(message)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.info("the connection to the coordinator broke off: %s", error)
