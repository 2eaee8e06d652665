"""A reached limit frees the real engine, and an engine that is lost counts on with what its tasks tell it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from spark_llm.engine.service.client import EngineClient, LimitReached, connect
from spark_llm.engine.service.protocol import WindowRequest

pytestmark = pytest.mark.faults
Engines = Any  # the fixture of conftest.py


def window(client: EngineClient, partition: int, hits: int) -> int:
    request = WindowRequest(
        query="q", node="n", limit=10, partition=partition, attempt=partition, rows=2 * hits, hits=hits
    )
    return client.window(request)


def test_running_and_waiting_rows_leave_the_engine(engines: Engines) -> None:
    client = connect(engines.spec(max_running_rows=4, check_invariants=True))
    header = msgspec.structs.replace(engines.header(max_tokens=8000, query="q"), node="n", limit=10)
    with client.stream(header) as stream:
        stream.send(engines.rows(range(20)))
        while client.status().running < 4:
            pass
        assert window(client, 0, 9) > 0
        assert window(client, 1, 1) == 0
        with pytest.raises(LimitReached):
            stream.receive()
        while (status := client.status()).waiting + status.running:
            pass
        assert (status.streams, status.output_tokens) == (1, 0)
    with client.stream(engines.header(query="q")) as stream:
        stream.send(engines.rows(range(5)))
        assert len(engines.receive_all(stream)) == 5
    engines.kill(engines.process(client.status()))
    assert window(client, 1, 1) == 3, "a new engine has heard of this task only"
    assert window(client, 0, 9) == 0
