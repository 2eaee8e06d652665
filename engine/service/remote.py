"""An engine of another executor as a task reaches it: Flight over TCP, with the application's key and, if set, TLS."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import NoReturn

import pyarrow.flight as flight

from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service.coordinator_protocol import Cluster, Endpoint

_HEADER = "authorization"
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


class RemoteEngine:
    """The connection of this process to an engine elsewhere; made anew for an engine that is started again.

    What an AnswerStream asks of an EngineClient. Raises OSError where the certificate to check it by cannot be read.
    """

    def __init__(self, spec: EngineSpec, cluster: Cluster, endpoint: Endpoint) -> None:
        self.spec = spec
        self.endpoint = endpoint
        given = {} if cluster.tls is None else {"tls_root_certs": Path(cluster.tls.ca_file).read_bytes()}
        scheme = "grpc+tcp" if cluster.tls is None else "grpc+tls"
        self._flight = flight.FlightClient(
            f"{scheme}://{endpoint.address}", middleware=[_ShowsKey(cluster.key)], generic_options=_OPTIONS, **given
        )

    def channel(self) -> flight.FlightClient:
        """The Flight client; connects on first use."""
        return self._flight

    def reconnect(self) -> NoReturn:
        """Only its own executor can start an engine."""
        raise ConnectionError(f"the engine at {self.endpoint.address} cannot be started from here")

    def log(self) -> tuple[str, str]:
        """Where the engine's log is; its lines are not at hand."""
        return f"engine.log on {self.endpoint.host}", "(on another host: see there)"

    def close(self) -> None:
        """Hangs up."""
        self._flight.close()


class ChecksKey(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses every call that does not show the application's key."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._expected = _value(key).encode()

    def start_call(self, info: flight.CallInfo, headers: dict[str, list[str]]) -> None:
        given = headers.get(_HEADER) or [""]
        if not hmac.compare_digest(given[0].encode(), self._expected):
            raise flight.FlightUnauthenticatedError("the application's key is missing or wrong")


class _ShowsKey(flight.ClientMiddlewareFactory):  # type: ignore[misc]
    def __init__(self, key: str) -> None:
        super().__init__()
        self._middleware = _KeyHeader(key)

    def start_call(self, info: flight.CallInfo) -> _KeyHeader:
        return self._middleware


class _KeyHeader(flight.ClientMiddleware):  # type: ignore[misc]
    def __init__(self, key: str) -> None:
        super().__init__()
        self._headers = {_HEADER: _value(key)}

    def sending_headers(self) -> dict[str, str]:
        return self._headers


def _value(key: str) -> str:
    return f"Bearer {key}"
