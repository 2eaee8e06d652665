"""The keys of which engines answer a task's rows, and how tasks and engines of several hosts trust each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from spark_llm.config_kinds import OPTIONAL_TEXT, Kind, integer, key
from spark_llm.errors import LlmError

if TYPE_CHECKING:
    from spark_llm.engine.service.coordinator_protocol import Tls

ROUTER_KEY = "spark.llm.router"
LOCAL = "local"
ROUTERS = (LOCAL, "d2lpm", "prefix", "leastLoaded", "roundRobin")  # those of ``routing.POLICIES``, which needs numpy


def _router(text: str) -> str:
    for name in ROUTERS:
        if name.lower() == text.lower():
            return name
    raise ValueError(text)


ROUTER = Kind(f"{', '.join(ROUTERS[:-1])} or {ROUTERS[-1]}", _router)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConf:
    """Router and TLS."""

    router: str = key(
        "router",
        ROUTER,
        LOCAL,
        "Which engines answer a task's rows. `local`: that of the task's own executor. `d2lpm`: rows that share a "
        "prefix go together to the engine of the application that holds it, fairly between clients and by how much "
        "each engine has to do; tasks and engines of different executors then talk over TCP. `prefix`, `leastLoaded` "
        "and `roundRobin` are simpler rules to measure it against.",
    )
    engines_per_executor: int = key(
        "engine.perExecutor",
        integer(1),
        "1",
        "Engines of one executor, which share its tasks and its cores. Where Spark gives tasks no GPUs, as in "
        "`local[N]`, each takes a GPU of its own (or as many as `spark.llm.engine.tensorParallel` says).",
    )
    engine_cert_file: str = key(
        "engine.tls.certFile",
        OPTIONAL_TEXT,
        "",
        "With `spark.llm.router`: path, on the driver and all executors, of the certificate (PEM) that engines and "
        "driver show, which names the host's address. Empty: connections between hosts are not encrypted.",
    )
    engine_key_file: str = key(
        "engine.tls.keyFile",
        OPTIONAL_TEXT,
        "",
        "Path of the certificate's private key (PEM).",
    )
    engine_ca_file: str = key(
        "engine.tls.caFile",
        OPTIONAL_TEXT,
        "",
        "Path of the certificates (PEM) of who may have signed engines' and driver's certificates.",
    )

    @property
    def tls(self) -> Tls | None:
        """How connections between hosts are encrypted; None: they are not. LLM_INVALID_CONFIG if a file is missing."""
        files = {
            "certFile": self.engine_cert_file,
            "keyFile": self.engine_key_file,
            "caFile": self.engine_ca_file,
        }
        if not any(files.values()):
            return None
        for name, path in files.items():
            if not path:
                expected = "a path, as other keys of spark.llm.engine.tls are set"
                raise LlmError("LLM_INVALID_CONFIG", key=f"spark.llm.engine.tls.{name}", value="''", expected=expected)
        from spark_llm.engine.service.coordinator_protocol import Tls  # which imports pyarrow

        return Tls(cert_file=files["certFile"], key_file=files["keyFile"], ca_file=files["caFile"])
