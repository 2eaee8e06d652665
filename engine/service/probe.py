"""Asks an engine on a Unix socket how it is: the request that tells a ready engine from a socket left behind."""

from __future__ import annotations

import msgspec
import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.service.protocol import EngineStatus

# every client has its own connection: a shared one would keep the waiting time of an engine that is gone
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def connection(socket: str) -> flight.FlightClient:
    """A Flight client of the engine at ``socket``; connects on first use."""
    return flight.FlightClient(f"grpc+unix://{socket}", generic_options=_OPTIONS)


def ask(client: flight.FlightClient, timeout: float) -> EngineStatus:
    """The engine's status. Raises pyarrow's errors when it does not answer within ``timeout`` seconds."""
    options = flight.FlightCallOptions(timeout=timeout)
    (result,) = client.do_action(flight.Action("status", b""), options)
    return msgspec.json.decode(result.body.to_pybytes(), type=EngineStatus)


def probe(socket: str, timeout: float) -> EngineStatus | None:
    """The status of the engine at ``socket``, None if it does not answer."""
    with connection(socket) as client:
        try:
            return ask(client, timeout)
        except (flight.FlightError, pa.ArrowException, OSError):
            return None
