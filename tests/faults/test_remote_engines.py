"""Several engine processes answer one stream: by prefix, and through the loss of any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pyarrow as pa
import pytest

from spark_llm.engine.service import dispatch_client
from spark_llm.engine.service.client import connect, list_engines
from spark_llm.engine.service.coordinator_server import CoordinatorServer
from spark_llm.engine.service.dispatch_client import ClusterClient
from spark_llm.engine.service.process import ProcessId
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, request_rows

pytestmark = pytest.mark.faults
Engines = Any  # the fixture of conftest.py
Member = tuple[ClusterClient, ProcessId]
GROUPS, SIZE = 8, 8


@pytest.fixture
def member(engines: Engines) -> Iterator[Callable[[int], Member]]:
    """Engine number 1, 2 ... of a cluster, as tasks of its executor see it, and its process."""
    coordinator = CoordinatorServer()

    def make(number: int) -> Member:
        # the number of threads makes them two engines of this process, which else has one for a spec
        spec = engines.spec(threads=number, max_running_rows=4)
        client = dispatch_client.connect(spec, 60.0, coordinator.cluster, "prefix")
        return client, engines.process(client._own.status())

    yield make
    coordinator.close()


def window(first: int = 0) -> pa.RecordBatch:
    """Rows in groups that share a prefix."""
    rows = [["Say.\n", f"The {k // SIZE}th group: {'text ' * 10}\n", f"row {k}"] for k in range(GROUPS * SIZE)]
    ids = range(first, first + len(rows))
    return request_rows(ids, pa.array(rows, REQUEST_SCHEMA.field("segments").type))


def listening(engine: ProcessId) -> list[str]:
    """Addresses at which the process listens on the network."""
    found = psutil.Process(engine.pid).net_connections(kind="inet")
    return [each.laddr.ip.removeprefix("::ffff:") for each in found if each.status == psutil.CONN_LISTEN]


def receive(stream: Any, most: int = 1 << 30) -> list[tuple[int, str]]:
    """Answers until there are as many, or no more."""
    found: list[tuple[int, str]] = []
    while len(found) < most and (batch := stream.receive()) is not None:
        assert not any(batch.column("error").is_valid().to_pylist())
        found += zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True)
    return found


def test_a_killed_engine_leaves_no_row_unanswered(engines: Engines, member: Callable[[int], Member]) -> None:
    local = connect(engines.spec(threads=1, max_running_rows=4))
    with local.stream(engines.header(max_tokens=40)) as stream:
        stream.send(window())
        expected = dict(receive(stream))
    alone = engines.process(local.status())
    assert listening(alone) == [], "without a router nothing listens"
    first, own = member(1)
    assert own == alone, "the engine that is there joins"
    second, other = member(2)
    assert listening(own) == listening(other) == ["127.0.0.1"]
    told = {engine.pid: engine.address.partition(":")[0] for engine in list_engines()}
    assert told[own.pid] == told[other.pid] == "127.0.0.1"

    # both work, each group at one of them
    with second.stream(engines.header(max_tokens=40)) as stream:
        stream.send(window())
        assert dict(receive(stream)) == expected
    status = [first._own.status(), second._own.status()]
    assert sum(each.rows_answered for each in status) == 2 * GROUPS * SIZE
    assert status[1].rows_answered % SIZE == 0
    assert 0 < status[1].rows_answered < GROUPS * SIZE

    # the own engine dies, and the other takes its rows over
    with first.stream(engines.header(max_tokens=40)) as stream:
        stream.send(window())
        found = receive(stream, 5)
        engines.kill(own)
        stream.send(window(1000))
        found += receive(stream)
    assert sorted(found) == sorted((expected | {1000 + row: text for row, text in expected.items()}).items())
    assert engines.living() == [other]

    # the other one dies, too: the own engine is started again, as there is none left
    with first.stream(engines.header(max_tokens=40)) as stream:
        stream.send(window())
        found = receive(stream, 5)
        engines.kill(other)
        found += receive(stream)
    assert sorted(found) == sorted(expected.items()), "every row once"
    (living,) = engines.living()
    assert living not in (own, other)
    assert listening(living) == ["127.0.0.1"], "it has joined again"
