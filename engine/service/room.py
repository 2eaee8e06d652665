"""Engines of one executor share its memory: one that finds none asks those that nobody uses to end."""

from __future__ import annotations

import contextlib

import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.service import process
from spark_llm.engine.service.folder import EngineFolder
from spark_llm.engine.service.probe import connection, probe

_ASK_SECONDS = 5.0
_END_SECONDS = 30.0
_GONE = (flight.FlightError, pa.ArrowException, OSError)


def make_room(folder: EngineFolder) -> tuple[int, list[str]]:
    """Ends the idle engines of the owner of ``folder``, but not that of ``folder`` itself.

    Returns how many ended, and the models of those that have streams open and so stay.
    """
    ended, busy = 0, []
    for path in sorted(folder.path.parent.iterdir()):
        state = EngineFolder(path).state() if path.is_dir() and path != folder.path else None
        status = None if state is None else probe(state.socket, _ASK_SECONDS)
        if state is None or status is None:
            continue
        if status.streams:
            busy.append(state.model)
            continue
        with process.watching(state.process) as watch:
            with (
                connection(state.socket) as client,
                contextlib.suppress(flight.FlightError, pa.ArrowException, OSError),
            ):
                list(client.do_action(flight.Action("shutdown", b"")))
            ended += watch.wait(_END_SECONDS)
    return ended, busy
