"""An engine process starts once, ends when it must, and leaves no row behind: real processes, real signals."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spark_llm.engine.service import folder as folders
from spark_llm.engine.service import launch, process
from spark_llm.engine.service.client import connect, list_engines
from spark_llm.engine.service.process import ProcessId
from spark_llm.errors import LlmError

pytestmark = pytest.mark.faults
Engines = Any  # the fixture of conftest.py

_OWNER = """
import os, sys, msgspec
from spark_llm.engine.config import EngineSpec
from spark_llm.engine.service.client import connect
print(connect(msgspec.json.decode(sys.argv[1], type=EngineSpec)).status().pid, flush=True)
sys.stdin.read()
"""

_CLIENT = """
import sys, msgspec, pyarrow as pa, pyarrow.flight as flight
from spark_llm.engine.service.probe import connection
from spark_llm.engine.service.protocol import REQUEST_SCHEMA, request_rows
writer, reader = connection(sys.argv[1]).do_exchange(flight.FlightDescriptor.for_command(sys.argv[2].encode()))
writer.begin(REQUEST_SCHEMA)
segments = pa.array([[f"row {i}"] for i in range(20)], REQUEST_SCHEMA.field("segments").type)
keys = pa.array([f"row {i}".encode() for i in range(20)], pa.binary())
writer.write_batch(request_rows(range(20), segments, keys=keys))
print("sent", flush=True)
reader.read_chunk()
"""


def spec_json(spec: Any) -> str:
    return msgspec.json.encode(spec).decode()


def test_many_threads_start_one_engine_and_signals_end_it(engines: Engines) -> None:
    spec = engines.spec()
    with ThreadPoolExecutor(8) as pool:
        pids = {status.pid for status in pool.map(lambda _: connect(spec).status(), range(8))}
    assert len(pids) == 1
    assert listed() == list(pids)
    (engine,) = engines.living()
    for number in (signal.SIGTERM, signal.SIGHUP):
        assert engines.files() >= {"engine.log", "state"}
        engines.kill(engine, number)
        assert engines.files() == set(), "a clean end takes the folder along"
        assert listed() == []
        engine = engines.process(connect(spec).status())
    assert listed() == [engine.pid]


def test_the_engine_ends_with_its_owner(engines: Engines) -> None:
    owner = engines.python(_OWNER, spec_json(engines.spec()))
    engine = ProcessId.of(int(owner.stdout.readline()))
    owner.kill()
    engines.await_end(engine)
    owner.wait()
    assert engines.living() == []
    assert engines.files() == set()


def test_workers_of_a_jvm_that_is_not_called_java_have_one_owner(engines: Engines) -> None:
    """A daemon is started by an executor; its workers are forked, as pyspark.daemon does."""
    worker = "from spark_llm.engine.service.process import owner; print(owner().pid, flush=True)"
    fork = (
        f"import os\nfor _ in range(2):\n    if os.fork() == 0:\n        {worker}\n        os._exit(0)\n    os.wait()"
    )
    start = "import os, subprocess, sys; os.environ['PYTHON_WORKER_FACTORY_SECRET'] = 'x'"
    start += "; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    executor = engines.python(start, fork)
    found = [int(executor.stdout.readline()) for _ in range(2)]
    assert found == [executor.pid, executor.pid]
    assert executor.wait(30) == 0


def test_an_engine_whose_owner_is_already_gone_does_not_start(engines: Engines) -> None:
    me = process.owner()
    folder = folders.engine_folder(me, "key")
    gone = ProcessId(me.pid, me.start - 1)  # the pid lives, but it is another process
    order = launch.Order(spec=engines.spec(), owner=gone, folder=str(folder.path), socket=folder.new_socket())
    code = f"import sys; sys.argv[1:] = [{spec_json(order)!r}]; from {launch.MAIN} import main; main()"
    started = engines.python(code)
    assert started.wait(60) == 0
    assert not Path(order.socket).exists()


def test_an_idle_engine_ends_and_the_next_query_starts_another(engines: Engines) -> None:
    client = connect(engines.spec(idle_timeout=0.4))
    first = engines.process(client.status())
    with client.stream(engines.header()) as stream:
        with process.watching(first) as watch:
            assert not watch.wait(1.5), "an open stream is not idle, with rows or without"
        stream.send(engines.rows(range(1)))
        assert len(engines.receive_all(stream)) == 1
    engines.await_end(first)
    with client.stream(engines.header()) as stream:
        stream.send(engines.rows(range(3)))
        assert len(engines.receive_all(stream)) == 3


def test_a_killed_engine_is_restarted_once_for_the_unanswered_rows_only(engines: Engines) -> None:
    client = connect(engines.spec(max_running_rows=4))
    with client.stream(engines.header(max_tokens=60)) as stream:
        stream.send(engines.rows(range(60)))
        expected = dict(engines.receive_all(stream))
    first = engines.process(client.status())
    with client.stream(engines.header(max_tokens=60, query="killed")) as stream:
        stream.send(engines.rows(range(30)))
        stream.send(engines.rows(range(30, 60)))
        batch = stream.receive()
        engines.kill(first)
        answered = list(zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True))
        answered += engines.receive_all(stream)
        status = client.status()
    assert [row for row, _ in sorted(answered)] == list(range(60)), "each row is answered exactly once"
    assert dict(answered) == expected
    assert status.pid != first.pid
    received, done = status.queries["killed"]
    assert received == done < 60, "only the rest ran again"


def test_an_engine_killed_twice_is_an_error_with_the_end_of_its_log(engines: Engines) -> None:
    client = connect(engines.spec())
    with client.stream(engines.header(max_tokens=4000)) as stream:
        stream.send(engines.rows(range(5)))
        first = engines.process(client.status())
        engines.kill(first)
        second = next_engine(client, first)
        wait_for(lambda: client.status().running > 0)
        engines.kill(second)
        with pytest.raises(LlmError) as caught:
            stream.receive()
    assert caught.value.condition == "LLM_ENGINE_LOST"
    assert caught.value.parameters["times"] == "2"
    assert caught.value.parameters["rows"] == "5"
    assert f"engine pid={second.pid}" in caught.value.parameters["tail"]
    assert Path(caught.value.parameters["log"]).exists()
    with client.stream(engines.header()) as stream:  # the next task starts anew
        stream.send(engines.rows(range(1)))
        assert len(engines.receive_all(stream)) == 1


def test_a_killed_clients_rows_leave_the_engine_while_another_stream_goes_on(engines: Engines) -> None:
    spec = engines.spec()
    client = connect(spec)
    state = folders.engine_folder(process.owner(), spec.key).state()
    assert state is not None
    with client.stream(engines.header(max_tokens=400, query="other")) as other:
        other.send(engines.rows(range(2)))
        header = spec_json(engines.header(max_tokens=8000, query="doomed"))
        doomed = engines.python(_CLIENT, state.socket, header)
        assert doomed.stdout.readline() == "sent\n"
        wait_for(lambda: (s := client.status()).queries.get("doomed") == (20, 0) and s.waiting + s.running >= 20)
        doomed.kill()
        wait_for(lambda: client.status().streams == 1, timeout=10.0)
        wait_for(lambda: (s := client.status()).waiting + s.running <= 2, timeout=10.0)
        assert len(engines.receive_all(other)) == 2
    doomed.wait()
    status = client.status()
    assert (status.waiting, status.running) == (0, 0)
    assert status.free_pages == status.total_pages, "cancelled rows hold no pages"
    assert status.queries["doomed"] == (20, 0)


def test_equal_rows_of_two_streams_survive_a_killed_engine(engines: Engines) -> None:
    """The new engine has forgotten who led and who waited; every row is answered once, and equal rows equally."""
    client = connect(engines.spec(max_running_rows=4))
    header = engines.header(max_tokens=60, query="q")
    with client.stream(header) as one, client.stream(header) as other:
        one.send(engines.rows(range(30), fold=True))
        other.send(engines.rows(range(30), fold=True))
        batch = one.receive()
        engines.kill(engines.process(client.status()))
        first = list(zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True))
        first += engines.receive_all(one)
        second = engines.receive_all(other)
    assert sorted(first) == sorted(second)
    assert [row for row, _ in sorted(first)] == list(range(30))


def test_rows_that_wait_for_those_of_a_killed_client_are_answered(engines: Engines) -> None:
    spec = engines.spec()
    client = connect(spec)
    state = folders.engine_folder(process.owner(), spec.key).state()
    assert state is not None
    header = engines.header(max_tokens=200, query="q")
    doomed = engines.python(_CLIENT, state.socket, spec_json(header))
    assert doomed.stdout.readline() == "sent\n"
    wait_for(lambda: client.status().queries.get("q", (0, 0))[0] == 20)
    with client.stream(header) as stream:
        stream.send(engines.rows(range(22), fold=True))
        wait_for(lambda: client.status().queries["q"][0] == 42)
        doomed.kill()
        wait_for(lambda: client.status().streams == 1, timeout=10.0)
        answered = engines.receive_all(stream)
    doomed.wait()
    assert sorted(row for row, _ in answered) == list(range(22))
    status = client.status()
    assert status.output_tokens == 22 * 200, "what had led was begun anew"
    wait_for(lambda: client.status().free_pages == status.total_pages)  # the status is as old as the last step


def test_a_hung_engine_is_replaced(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "HUNG_SECONDS", 0.5)
    spec = engines.spec()
    first = engines.process(connect(spec).status())
    os.kill(first.pid, signal.SIGSTOP)
    state = launch.ensure(spec, 60.0)
    assert state.process != first
    assert not first.alive


def test_an_engine_whose_launcher_was_killed_is_waited_for(engines: Engines) -> None:
    """The launcher dies while the model loads; the engine belongs to the JVM, which lives."""
    spec = engines.spec()
    me = process.owner()
    code = f"""
import sys, msgspec
from spark_llm.engine.service import launch, process
process.owner = lambda: process.ProcessId({me.pid}, {me.start})
launch._await_ready = lambda state, *_: (print(state.process.pid, flush=True), sys.stdin.read())
launch.ensure(msgspec.json.decode(sys.argv[1], type=launch.EngineSpec), 60.0)
"""
    launcher = engines.python(code, spec_json(spec))
    pid = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    assert connect(spec).status().pid == pid


def test_an_error_that_no_step_survives_ends_the_process_and_the_rows_run_again(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first engine's third step fails in a way that the engine does not handle: a bug, say."""
    (engines.tmp / "broken_main.py").write_text(
        f"""
import pathlib
from spark_llm.engine.core import Engine
from spark_llm.engine.service.main import main
step, first, steps = Engine.step, pathlib.Path({str(engines.tmp / "first")!r}), []
def broken(self):
    steps.append(0)
    if len(steps) == 3 and not first.exists():
        first.touch()
        raise KeyError("the bug")
    return step(self)
Engine.step = broken
main()
"""
    )
    monkeypatch.syspath_prepend(str(engines.tmp))
    monkeypatch.setattr(launch, "MAIN", "broken_main")
    client = connect(engines.spec())
    with client.stream(engines.header(max_tokens=20)) as stream:
        stream.send(engines.rows(range(40)))
        assert sorted(row for row, _ in engines.receive_all(stream)) == list(range(40))
    log = Path(client.log()[0]).read_text()
    assert log.count("ready after") == 2
    assert "ends: KeyError: 'the bug'" in log


def listed() -> list[int]:
    """Pids of this process's engines, as the command line would list them."""
    return [status.pid for status in list_engines() if status.owner == os.getpid()]


def next_engine(client: Any, last: ProcessId) -> ProcessId:
    """The engine after ``last``, once it answers."""
    wait_for(lambda: client.status().pid != last.pid, timeout=60.0)
    found = ProcessId.of(client.status().pid)
    assert found is not None
    return found


def wait_for(condition: Any, timeout: float = 30.0) -> None:
    """Looks until ``condition`` holds; an engine in another process sends no events."""
    tick = threading.Event()
    for _ in range(int(timeout / 0.02)):
        if condition():
            return
        tick.wait(0.02)
    raise AssertionError("the condition did not come true")
