"""The speed of engines, remembered between applications: tokens a second of one engine, by model and machine.

A small JSON file in the user's cache folder. Without it, or where it cannot be read or written, a first query is
planned by a guess; so nothing here raises, and nobody waits for another writer: the last one's file stands.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

_MOST = 100  # remembered speeds; those written longest ago go


def remembered(engine: str) -> float | None:
    """Tokens a second of the engines with this name (``engine_name``), None where none was measured."""
    found = _read(_file()).get(engine)
    return found if found is not None and math.isfinite(found) and found > 0 else None


def remember(engine: str, tokens_per_second: float) -> None:
    """Keep what was measured for later applications of this user."""
    file = _file()
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = _read(file)
        known.pop(engine, None)
        known[engine] = round(tokens_per_second, 1)
        handle, name = tempfile.mkstemp(prefix=".speeds-", dir=file.parent)  # readable by this user only
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as new:
                json.dump(dict(list(known.items())[-_MOST:]), new, indent=1)
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def engine_name(model: str, arithmetic: str, device: str, threads: int, master: str) -> str:
    """What engines of equal speed have in common: model, number format, device, threads (0: all cores), machine.

    Of a cluster the master's address stands for its machines; a local Spark has this host's name.
    """
    place = f"{os.uname().nodename} with {os.cpu_count()} cores" if master.startswith("local") else master
    return f"{model}, {arithmetic}, {device}, {threads or 'all'} threads, {place}"


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "spark-llm" / "speeds.json"


def _read(file: Path) -> dict[str, float]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: float(speed) for name, speed in found.items() if isinstance(speed, int | float)}
