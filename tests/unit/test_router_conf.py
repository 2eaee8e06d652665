"""spark.llm.router and its TLS files, and when the driver listens for engines: on demand, and never in the clear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spark_llm.config import LlmConf
from spark_llm.config_routing import ROUTERS
from spark_llm.coordination import Coordination, DriverAddress
from spark_llm.engine.service.coordinator_protocol import Tls
from spark_llm.engine.service.routing import POLICIES
from spark_llm.errors import LlmError

TLS = {f"spark.llm.engine.tls.{name}": f"/etc/{name}" for name in ("certFile", "keyFile", "caFile")}


class FakeContext:
    """A SparkContext's master and settings."""

    def __init__(self, master: str, **settings: str) -> None:
        self.master = master
        self._settings = {f"spark.{key.replace('__', '.')}": value for key, value in settings.items()}

    def getConf(self) -> Any:
        return self._settings


@pytest.fixture
def coordination() -> Iterator[Coordination]:
    made = Coordination(DriverAddress("127.0.0.1", "127.0.0.1", False))
    yield made
    made.close()


def conf(**settings: str) -> LlmConf:
    return LlmConf.parse({f"spark.llm.{key}": value for key, value in settings.items()})


def test_routers_are_written_in_any_case() -> None:
    assert list(ROUTERS) == ["local", *POLICIES]
    assert conf().router == "local"
    assert conf(router="D2LPM").router == "d2lpm"
    assert conf(router="roundrobin").router == "roundRobin"
    with pytest.raises(LlmError, match=r"LLM_INVALID_CONFIG.*local, d2lpm, prefix, leastLoaded or roundRobin"):
        conf(router="dlpm")


def test_tls_needs_all_three_files() -> None:
    assert conf().tls is None
    assert LlmConf.parse(TLS).tls == Tls(cert_file="/etc/certFile", key_file="/etc/keyFile", ca_file="/etc/caFile")
    for missing in TLS:
        with pytest.raises(LlmError, match=f"LLM_INVALID_CONFIG.*{missing}"):
            _ = LlmConf.parse({key: path for key, path in TLS.items() if key != missing}).tls


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (FakeContext("local[2]", driver__host="10.0.0.1"), ("127.0.0.1", "127.0.0.1", False)),
        (FakeContext("local-cluster[2,1,1024]"), ("127.0.0.1", "127.0.0.1", False)),
        (FakeContext("yarn", driver__host="10.0.0.1"), ("10.0.0.1", "10.0.0.1", False)),
        (FakeContext("k8s://x", driver__host="[::1]", driver__bindAddress="0.0.0.0"), ("0.0.0.0", "::1", False)),
        (FakeContext("yarn", driver__host="h", network__crypto__enabled="true"), ("h", "h", True)),
        (FakeContext("yarn", driver__host="h", ssl__enabled="true"), ("h", "h", True)),
    ],
)
def test_the_driver_listens_where_spark_does(context: Any, expected: tuple[str, str, bool]) -> None:
    assert DriverAddress.of(context) == expected


def test_nothing_listens_before_it_is_needed_and_then_once(coordination: Coordination) -> None:
    assert coordination.server is None
    cluster = coordination.start(conf(router="d2lpm"))
    assert coordination.start(conf(router="prefix")) is cluster
    assert len(cluster.key) == 64
    assert cluster.tls is None


def test_where_spark_encrypts_a_router_needs_tls() -> None:
    coordination = Coordination(DriverAddress("127.0.0.1", "127.0.0.1", True))
    with pytest.raises(LlmError, match=r"LLM_ROUTER_NEEDS_TLS.*d2lpm"):
        coordination.start(conf(router="d2lpm"))
    assert coordination.server is None


def test_what_keeps_the_driver_from_listening_is_told(coordination: Coordination) -> None:
    with pytest.raises(LlmError, match=r"LLM_ROUTER_START_FAILED.*No such file"):
        coordination.start(LlmConf.parse({"spark.llm.router": "d2lpm", **TLS}))
    assert coordination.start(conf(router="d2lpm")).port > 0, "it may be tried again"
