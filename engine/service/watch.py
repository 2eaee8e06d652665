"""The life of an engine process: it ends with its owner, on a signal, when idle, or when no client can find it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from spark_llm.engine.service import process
from spark_llm.engine.service.folder import EngineFolder
from spark_llm.engine.service.process import ProcessId

log = logging.getLogger("life")

LOOK_SECONDS = 2.0  # between two looks at idleness and at the state file; the owner's end is noticed at once
LOCK_SECONDS = 2.0  # a task that just lost its engine holds the lock; it may be about to end, too


class Life:
    """Ends this process, once, leaving nothing behind. ``owner`` is the process that it must not outlive.

    before_end: called first, by the thread that ends the process.
    """

    def __init__(self, folder: EngineFolder, owner: ProcessId, socket: str) -> None:
        self._folder = folder
        self._owner = owner
        self._socket = socket
        self.before_end: Callable[[], object] = lambda: None
        self._ending = threading.RLock()  # a signal may interrupt the thread that is ending the process

    def end(self, reason: str, code: int = 0) -> NoReturn:
        """Ends the process at once with ``code``; never returns. Clients see a lost connection.

        A clean end (code 0) removes the engine's files; after an error the log stays.
        """
        self._ending.acquire()
        log.info("ends: %s", reason)
        with contextlib.suppress(Exception):
            self.before_end()
        # without the lock a new engine may be moving in: then its launcher owns the folder
        with contextlib.suppress(Timeout, OSError), FileLock(self._folder.lock, timeout=LOCK_SECONDS):
            state = self._folder.state()
            if state is None or state.socket == self._socket:
                Path(self._socket).unlink(missing_ok=True)
                if code == 0:
                    self._folder.remove()
        if code == 0 and not self._owner.alive:  # whoever holds the lock is an orphan, too
            self._folder.remove()
            self._folder.lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other engines of the owner still have files there
                self._folder.path.parent.rmdir()
        logging.shutdown()
        sys.stderr.flush()
        # no interpreter teardown: threads inside native code could hang or crash it
        os._exit(code)

    def handle_signals(self) -> None:
        """SIGTERM, SIGINT and SIGHUP end the process; the last one not where it was ignored (nohup)."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, lambda n, _: self.end(f"signal {signal.Signals(n).name}"))

    def watch_owner(self) -> None:
        """From now on the process ends with its owner."""
        threading.Thread(target=self._wait_for_owner, name="owner", daemon=True).start()

    def _wait_for_owner(self) -> None:
        with process.watching(self._owner) as watch:
            while not watch.wait(3600.0):
                pass
        self.end(f"its owner, process {self._owner.pid}, has ended")

    def stay(self, idle_seconds: Callable[[], float], idle_timeout: float) -> NoReturn:
        """Keeps the process alive until it has been idle for ``idle_timeout`` seconds (0: for ever)."""
        step = min(LOOK_SECONDS, idle_timeout / 4) if idle_timeout > 0 else LOOK_SECONDS
        pause = threading.Event()
        while True:
            pause.wait(step)
            idle = idle_seconds()
            if 0 < idle_timeout <= idle:
                self.end(f"idle for {idle:.1f} s")
            state = self._folder.state()
            if idle > LOOK_SECONDS and (state is None or state.socket != self._socket):
                self.end("another engine has taken its place")
