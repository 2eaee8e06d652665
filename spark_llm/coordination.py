"""The driver's part where engines of several executors answer together: the coordinator that they and tasks ask.

It listens as soon as a query with ``spark.llm.router`` other than ``local`` is analysed, until the application ends.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from pyspark import SparkContext

    from spark_llm.config import LlmConf
    from spark_llm.engine.service.coordinator_protocol import Cluster
    from spark_llm.engine.service.coordinator_server import CoordinatorServer


class DriverAddress(NamedTuple):
    """Where the driver listens (``bind``) and how executors reach it (``host``). is_private: Spark encrypts its own
    connections there, so nothing of the user's may travel in the clear."""

    bind: str
    host: str
    is_private: bool

    @classmethod
    def of(cls, context: SparkContext) -> DriverAddress:
        """The address that Spark itself uses."""
        if context.master.startswith("local"):
            return cls("127.0.0.1", "127.0.0.1", False)
        conf = context.getConf()
        host = conf.get("spark.driver.host") or "127.0.0.1"
        bind = conf.get("spark.driver.bindAddress") or host
        encrypts = (conf.get("spark.network.crypto.enabled"), conf.get("spark.ssl.enabled"))
        return cls(bind, host.strip("[]"), "true" in encrypts)


class Coordination:
    """The coordinator of one application, which is started when it is first needed."""

    def __init__(self, address: DriverAddress) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._server: CoordinatorServer | None = None

    @property
    def server(self) -> CoordinatorServer | None:
        """What listens; None: nothing does."""
        return self._server

    def start(self, conf: LlmConf) -> Cluster:
        """What tasks need to know, once the coordinator listens. ``conf`` says how connections are encrypted; only that
        of the first call does. Raises LLM_ROUTER_NEEDS_TLS, LLM_ROUTER_START_FAILED."""
        from spark_llm.engine.service.coordinator_server import CoordinatorServer

        with self._lock:
            if self._server is None:
                if self._address.is_private and conf.tls is None:
                    raise LlmError("LLM_ROUTER_NEEDS_TLS", router=conf.router)
                bind, host, _ = self._address
                try:
                    self._server = CoordinatorServer(bind, host, conf.tls)
                except OSError as error:
                    reason = str(error)
                    raise LlmError("LLM_ROUTER_START_FAILED", router=conf.router, bind=bind, reason=reason) from error
            return self._server.cluster

    def close(self) -> None:
        """Stop listening."""
        with self._lock:
            if self._server is not None:
                self._server.close()
