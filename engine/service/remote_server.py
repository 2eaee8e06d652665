"""The engine's second door: the exchanges of its Unix socket over TCP, for who shows the application's key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from spark_llm.engine.service.coordinator_protocol import Cluster, Endpoint
from spark_llm.engine.service.remote import ChecksKey


class RemoteServer(flight.FlightServerBase):  # type: ignore[misc]
    """Listens on a port of its own at ``host`` from construction on. ``exchange`` is what answers a do_exchange.

    Raises OSError where it cannot listen, or a certificate cannot be used. Actions are for the engine's own host.
    """

    def __init__(self, host: str, cluster: Cluster, exchange: Callable[..., None]) -> None:
        self._exchange = exchange
        address = Endpoint(host, 0).address
        middleware = {"key": ChecksKey(cluster.key)}
        try:
            if cluster.tls is None:
                super().__init__(f"grpc+tcp://{address}", middleware=middleware)
            else:
                pair = (Path(cluster.tls.cert_file).read_bytes(), Path(cluster.tls.key_file).read_bytes())
                super().__init__(f"grpc+tls://{address}", middleware=middleware, tls_certificates=[pair])
        except pa.ArrowException as error:
            raise OSError(f"cannot listen at {address}: {error}") from error

    def do_exchange(self, *given: Any) -> None:
        self._exchange(*given)
