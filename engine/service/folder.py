"""Where the engines of this user keep lock, socket, state and log: folders that no other user can enter.

``<tmp>/spark-llm-<uid>/<owner pid>-<owner start>/<spec key>/`` holds one engine's files; its lock lies beside it, so
that the folder can go while the lock is held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from spark_llm.engine.service.process import ProcessId
from spark_llm.engine.service.protocol import learn
from spark_llm.errors import LlmError

SOCKET_PATH_LIMIT = 107  # bytes: sun_path of unix(7) without its final NUL
KEEP_SECONDS = 24 * 3600.0  # logs of engines that failed are kept for a day after their owner ended
_NAME_BYTES = 64  # "/<pid>-<start>/<16 hex digits>/s.<8 hex digits>" at most, with a margin
_FALLBACK = "/tmp"
_T = TypeVar("_T", bound=msgspec.Struct)


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """What a client needs to reach an engine: its process, its socket, and where its part of the log begins."""

    process: ProcessId
    socket: str
    model: str
    log_offset: int = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why an engine did not start: an LlmError's condition and parameters. ``at`` is on the monotonic clock."""

    condition: str
    parameters: dict[str, str]
    at: float

    @classmethod
    def of(cls, error: LlmError) -> Failure:
        return cls(condition=error.condition, parameters=error.parameters, at=time.monotonic())

    def error(self) -> LlmError:
        return LlmError(self.condition, **self.parameters)


learn(EngineState, Failure)


@dataclass(frozen=True)
class EngineFolder:
    """The files of one engine (one owner, one spec)."""

    path: Path

    @property
    def lock(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    @property
    def log(self) -> Path:
        return self.path / "engine.log"

    @property
    def state_file(self) -> Path:
        return self.path / "state"

    @property
    def failure_file(self) -> Path:
        return self.path / "failed"

    def new_socket(self) -> str:
        """A path for a socket, new for each start: gRPC unlinks the path when it closes, late or not."""
        return str(self.path / f"s.{os.urandom(4).hex()}")

    def state(self) -> EngineState | None:
        return _read(self.state_file, EngineState)

    def write_state(self, state: EngineState) -> None:
        _write(self.state_file, state)

    def failure(self) -> Failure | None:
        return _read(self.failure_file, Failure)

    def write_failure(self, failure: Failure) -> None:
        _write(self.failure_file, failure)

    def forget_failure(self) -> None:
        self.failure_file.unlink(missing_ok=True)

    def log_size(self) -> int:
        try:
            return self.log.stat().st_size
        except FileNotFoundError:
            return 0

    def log_tail(self, offset: int = 0, lines: int = 20) -> str:
        """The last lines of the log, none of them from before byte ``offset``."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(offset, end - 16_384))
                text = log.read().decode("utf-8", "replace")
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"

    def remove(self) -> None:
        """Removes the engine's files; the lock stays for those who wait for it."""
        shutil.rmtree(self.path, ignore_errors=True)


def roots() -> list[Path]:
    """Every folder under which this user's engines may live on this host, preferred first; they need not exist."""
    folders = dict.fromkeys(Path(place) / f"spark-llm-{os.getuid()}" for place in (tempfile.gettempdir(), _FALLBACK))
    return [folder for folder in folders if len(os.fsencode(folder)) + _NAME_BYTES <= SOCKET_PATH_LIMIT]


def engine_folder(owner: ProcessId, key: str) -> EngineFolder:
    """The folder of the engine of ``owner`` and spec ``key``, made if it is missing.

    Raises LLM_ENGINE_FOLDER_UNSAFE where another user could have a hand in it, or where it cannot be made.
    """
    root = roots()[0]
    for folder in (root, root / str(owner), root / str(owner) / key):
        _make_private(folder)
    return EngineFolder(root / str(owner) / key)


def all_folders() -> list[EngineFolder]:
    """The folders of all engines of this user on this host, living or not."""
    found = []
    for root in roots():
        if _unsafe(root) is None:
            found += [EngineFolder(path) for path in sorted(root.glob("*-*/*")) if path.is_dir()]
    return found


def sweep() -> None:
    """Removes what engines that were killed left behind, a day after their owner ended."""
    for folder in all_folders():
        owner = folder.path.parent
        pid, _, start = owner.name.partition("-")
        if not (pid.isdigit() and start.isdigit()) or ProcessId(int(pid), int(start)).alive:
            continue
        with contextlib.suppress(OSError):
            newest = max((file.stat().st_mtime for file in folder.path.iterdir()), default=0.0)
            if time.time() - newest > KEEP_SECONDS:
                shutil.rmtree(owner, ignore_errors=True)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LlmError("LLM_ENGINE_FOLDER_UNSAFE", path=folder, reason=f"cannot be made: {error.strerror}") from error
    reason = _unsafe(folder)
    if reason is not None:
        raise LlmError("LLM_ENGINE_FOLDER_UNSAFE", path=folder, reason=reason)


def _unsafe(folder: Path) -> str | None:
    """Why ``folder`` cannot be trusted, None if it can."""
    try:
        info = folder.lstat()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISDIR(info.st_mode):
        return "is not a folder"
    if info.st_uid != os.getuid():
        return f"belongs to user {info.st_uid}, not to {os.getuid()}"
    if info.st_mode & 0o077:
        return f"is open to other users (mode {stat.S_IMODE(info.st_mode):o})"
    return None


def _read(path: Path, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _write(path: Path, value: msgspec.Struct) -> None:
    """Atomically: readers see the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(value))
    temporary.replace(path)
