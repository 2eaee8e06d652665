"""Answers outlive engines: real processes are killed, and what they committed is found by the next ones."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from spark_llm.engine.service.client import EngineClient, connect
from spark_llm.engine.service.protocol import ResultCache, StreamOpen

pytestmark = pytest.mark.faults
Engines = Any  # the fixture of conftest.py


def header(engines: Engines, folder: Path, query: str, **settings: Any) -> StreamOpen:
    opened: StreamOpen = engines.header(query=query, **settings)
    return msgspec.structs.replace(opened, cache=ResultCache(path=folder.as_uri()))


def ask(client: EngineClient, engines: Engines, opened: StreamOpen, rows: range) -> dict[int, tuple[str, bool]]:
    """Row -> (text, was it stored)."""
    found: dict[int, tuple[str, bool]] = {}
    with client.stream(opened) as stream:
        stream.send(engines.rows(rows, fold=True))
        while (batch := stream.receive()) is not None:
            columns = (batch.column(name).to_pylist() for name in ("id", "text", "stored", "error"))
            for row, text, stored, error in zip(*columns, strict=True):
                assert error is None
                found[row] = (text, stored)
    return found


def committed(folder: Path) -> int:
    """How many answers the segments hold."""
    return sum(pa.ipc.open_file(path).read_all().num_rows for path in folder.rglob("*.arrow"))


def until_committed(folder: Path, client: EngineClient, answers: int) -> None:
    """Returns when so many are there. Asking the engine is the wait: it shows, too, that it is not held up."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if committed(folder) >= answers:
            return
        client.status()
    raise AssertionError(f"{committed(folder)} answers are written, not {answers}")


def test_what_a_killed_engine_committed_is_there(engines: Engines, tmp_path: Path) -> None:
    client = connect(engines.spec())
    before = ask(client, engines, header(engines, tmp_path, "1"), range(50))
    assert not any(stored for _, stored in before.values())
    until_committed(tmp_path, client, 50)
    engines.kill(engines.process(client.status()))
    after = ask(client, engines, header(engines, tmp_path, "2"), range(60))
    assert {row for row, (_, stored) in after.items() if stored} == set(range(50))
    assert {row: after[row][0] for row in before} == {row: text for row, (text, _) in before.items()}
    status = client.status()
    assert (status.rows_stored, status.rows_received) == (50, 60)
    assert status.prompt_tokens == 10 * len("row 50"), "stored rows were computed"


def test_an_engine_killed_while_it_works_and_writes_leaves_whole_segments(engines: Engines, tmp_path: Path) -> None:
    client = connect(engines.spec())
    expected = ask(client, engines, StreamOpen(query="0", params=engines.header().params), range(120))
    with client.stream(header(engines, tmp_path, "1")) as working:
        working.send(engines.rows(range(60), fold=True))
        for start in range(60, 120, 10):  # each stream that closes has the answers so far written
            ask(client, engines, header(engines, tmp_path, "1"), range(start, start + 10))
        until_committed(tmp_path, client, 10)
        engines.kill(engines.process(client.status()))
    after = ask(client, engines, header(engines, tmp_path, "2"), range(120))
    assert {row: text for row, (text, _) in after.items()} == {row: text for row, (text, _) in expected.items()}
    assert sum(stored for _, stored in after.values()) >= 10
    again = ask(client, engines, header(engines, tmp_path, "3"), range(120))
    assert all(stored for _, stored in again.values())


def test_an_engine_that_is_told_to_end_writes_what_it_has(engines: Engines, tmp_path: Path) -> None:
    client = connect(engines.spec())
    with client.stream(header(engines, tmp_path, "1")) as stream:
        stream.send(engines.rows(range(20), fold=True))
        assert len(engines.receive_all(stream)) == 20
        engines.kill(engines.process(client.status()), signal.SIGTERM)
    assert committed(tmp_path) == 20
    after = ask(client, engines, header(engines, tmp_path, "2"), range(20))
    assert all(stored for _, stored in after.values())


def test_two_engines_see_each_others_answers_in_a_later_query(engines: Engines, tmp_path: Path) -> None:
    specs = [engines.spec(dtype="float32", max_running_rows=rows) for rows in (8, 16)]
    first, second = map(connect, specs)
    assert first.status().pid != second.status().pid
    ask(first, engines, header(engines, tmp_path, "1"), range(10))
    ask(second, engines, header(engines, tmp_path, "1"), range(10, 20))
    until_committed(tmp_path, second, 20)
    found = ask(first, engines, header(engines, tmp_path, "2"), range(25))
    assert {row for row, (_, stored) in found.items() if stored} == set(range(20))
    until_committed(tmp_path, second, 25)
    found = ask(second, engines, header(engines, tmp_path, "2"), range(25))
    assert all(stored for _, stored in found.values())
    other = connect(engines.spec(dtype="bfloat16"))
    found = ask(other, engines, header(engines, tmp_path, "4"), range(3))
    assert not any(stored for _, stored in found.values()), "another number format is another model"
