"""Which process an engine belongs to and how its end is noticed: ids safe from pid reuse, pidfd waits, usable cores."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil


class ProcessId(msgspec.Struct, frozen=True):
    """A process of this host. ``start`` tells it from a later one with the same pid: see ``start_time``."""

    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.pid}-{self.start}"

    @property
    def alive(self) -> bool:
        """True while the process runs; a zombie has ended."""
        return start_time(self.pid) == self.start

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has ``pid`` now, None if there is none."""
        start = start_time(pid)
        return None if start is None else cls(pid, start)


def start_time(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot (elsewhere than on Linux: hundredths of a second since 1970).

    None if there is no such process or only its zombie.
    """
    try:
        # the command name (field 2) may hold spaces and parentheses: what follows the last ")" is regular
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/stat"):
            return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time() * 100)
    except psutil.NoSuchProcess:
        return None


def owner() -> ProcessId:
    """The process whose end also ends the engine: in a Spark worker the executor's JVM, else this process.

    All workers of an executor must find the same one, or each would start an engine of its own.
    """
    pid = os.getpid()
    if any(name.startswith("PYTHON_WORKER_FACTORY_") for name in os.environ):
        pid = _executor(pid)
    found = ProcessId.of(pid) or ProcessId.of(os.getpid())
    if found is None:
        raise RuntimeError(f"cannot read the start time of process {pid}")
    return found


def _executor(worker: int) -> int:
    """The JVM above a Spark worker: the next process called java; where a JVM is called otherwise, the daemon's parent.

    Spark's worker is forked by ``pyspark.daemon`` and shares its command line; the daemon is a child of the JVM, as the
    worker itself is without a daemon (``spark.python.use.daemon=false``).
    """
    executor = None
    pid, command = worker, _command(worker)
    while parent := _parent(pid):
        if _name(parent) == "java":
            return parent
        if executor is None and _command(parent) != command:
            executor = parent
        pid = parent
    return executor or worker


def _parent(pid: int) -> int:
    """0 if there is none, or it may not be known."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).ppid()
    return 0


def _name(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).name()
    return ""


def _command(pid: int) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).cmdline()
    return []


class Watch:
    """Waits for the end of one process, by pidfd where the kernel has it, else by looking once a second."""

    def __init__(self, process: ProcessId) -> None:
        self.process = process
        self._fd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            self._fd = os.pidfd_open(process.pid)
        # after opening: from here on the descriptor cannot come to mean another process
        self._gone = not process.alive

    def wait(self, timeout: float) -> bool:
        """True as soon as the process has ended, False after ``timeout`` seconds."""
        if self._gone:
            return True
        if self._fd is not None:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            self._gone = bool(poll.poll(max(0, timeout) * 1000))
            return self._gone
        deadline = time.monotonic() + timeout
        while self.process.alive:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(1.0, left))
        self._gone = True
        return True

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@contextlib.contextmanager
def watching(process: ProcessId) -> Iterator[Watch]:
    """A ``Watch`` that is closed at the end of the block."""
    watch = Watch(process)
    try:
        yield watch
    finally:
        watch.close()


def usable_cores() -> int:
    """Cores that this process may keep busy: its CPU affinity, cut by the container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [cores]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip().lstrip("/")
        folder = Path("/sys/fs/cgroup") / group
        for place in (folder, *folder.parents):
            if place.name and (limit := place / "cpu.max").exists():
                quota, period = limit.read_text().split()
                if quota != "max":
                    quotas.append(max(1, int(quota) // int(period)))
    return min(quotas)
