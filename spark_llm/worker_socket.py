"""The socket between a Python worker and Spark: answers leave at once, and its end is noticed.

Spark writes answers into a buffer of 64 KiB that it empties when full: without a flush, a LIMIT could not stop
a task before thousands of short answers are there. And a worker learns that nobody reads any more only by
writing: without a watch, the engine would go on with rows that nobody wants. The watch ends the worker
process, which serves one task at a time and is of no use without its socket; so its engine streams close.
PySpark hands the socket to no UDF: it is looked up in the calling frames, and without it both are left out.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from typing import IO, Any, NoReturn

_log = logging.getLogger("spark_llm.worker_socket")


class WorkerSocket:
    """Spark's end of this task: from here to ``close`` the process ends as soon as Spark closes it."""

    def __init__(self) -> None:
        self._file = _output_file()
        self._stop: tuple[int, int] | None = None
        if self._file is None or not hasattr(select, "POLLRDHUP"):
            return
        self._stop = os.pipe()
        self._thread = threading.Thread(
            target=self._watch, args=(self._file.fileno(), self._stop[0]), name="spark-llm-hang-up", daemon=True
        )
        self._thread.start()

    def flush(self) -> None:
        """Send Spark what has been written. Not for a task's last answers: Spark may hang up on having them."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError:
                _leave()

    def close(self) -> None:
        """Stop watching."""
        if self._stop is not None:
            os.close(self._stop[1])
            self._thread.join()
            os.close(self._stop[0])
            self._stop = None

    @staticmethod
    def _watch(socket: int, stop: int) -> None:
        poll = select.poll()
        poll.register(socket, select.POLLRDHUP)  # and POLLHUP and POLLERR, which need no asking
        poll.register(stop, 0)
        # Where both have ended, the task ends because Spark hung up: leaving spares it a broken pipe.
        if socket in {ready for ready, _ in poll.poll()}:
            _leave()


def _leave() -> NoReturn:
    _log.info("Spark reads no more answers of this task: the rest is cancelled")
    os._exit(0)


def _output_file() -> IO[bytes] | None:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("pyspark.") and "outfile" in frame.f_locals:
            file: IO[bytes] = frame.f_locals["outfile"]
            return file
        frame = frame.f_back
    return None
