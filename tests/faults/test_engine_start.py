"""An engine that does not start says why, to all who wait, and is started anew once the cause is gone."""

from __future__ import annotations

import json
import os
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spark_llm.engine.service import folder as folders
from spark_llm.engine.service import launch, process
from spark_llm.engine.service.client import connect
from spark_llm.engine.service.process import ProcessId
from spark_llm.errors import LlmError

pytestmark = pytest.mark.faults
Engines = Any  # the fixture of conftest.py


def failure_of(call: Callable[[], object]) -> LlmError:
    with pytest.raises(LlmError) as caught:
        call()
    return caught.value


def test_an_unknown_model_is_named_to_all_who_wait_by_one_attempt(engines: Engines) -> None:
    spec = engines.spec(model="/nowhere/model.gguf")
    with ThreadPoolExecutor(4) as pool:
        failures = list(pool.map(lambda _: failure_of(lambda: launch.ensure(spec, 60.0)), range(4)))
    assert {failure.condition for failure in failures} == {"LLM_MODEL_NOT_FOUND"}
    assert {failure.parameters["model"] for failure in failures} == {"/nowhere/model.gguf"}
    assert log_of(spec).count("engine pid=") == 1


def test_a_start_succeeds_once_its_cause_of_failure_is_gone(engines: Engines) -> None:
    config = Path(engines.model.removeprefix("dummy:")) / "config.json"
    folder = engines.tmp / "model"
    folder.mkdir()
    spec = engines.spec(model=f"dummy:{folder}")
    assert failure_of(lambda: connect(spec)).condition == "LLM_MODEL_NOT_FOUND"
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((config.parent / name).read_bytes())
    assert connect(spec).status().model == spec.model
    assert log_of(spec).count("engine pid=") == 2


def test_a_crash_at_the_start_comes_with_the_end_of_the_log(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    (engines.tmp / "sitecustomize.py").write_text("import os; os.write(2, b'it was this'); os.abort()")
    monkeypatch.setattr("sys.path", [str(engines.tmp)])
    failure = failure_of(lambda: connect(engines.spec()))
    assert failure.condition == "LLM_ENGINE_START_FAILED"
    assert failure.parameters["reason"] == "its process ended with signal SIGABRT"
    assert failure.parameters["tail"].startswith("it was this")
    assert Path(failure.parameters["log"]).read_text() == failure.parameters["tail"]


def test_an_engine_that_takes_too_long_is_ended(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    (engines.tmp / "sitecustomize.py").write_text("import signal; signal.pause()")
    monkeypatch.setattr("sys.path", [str(engines.tmp)])
    failure = failure_of(lambda: connect(engines.spec(), start_timeout=0.5))
    assert failure.parameters["reason"] == "it was not ready after 0.5 s"
    assert engines.living() == []


def test_the_engine_gets_the_import_path_and_the_threads_of_its_spec(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = engines.tmp / "report"
    lines = "import json, os, sys; json.dump([dict(os.environ), sys.path], open({!r}, 'w')); os._exit(3)"
    (engines.tmp / "sitecustomize.py").write_text(lines.format(str(report)))
    monkeypatch.syspath_prepend(str(engines.tmp))
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Spark sets it for a task of one core
    monkeypatch.setenv("PYTHON_WORKER_FACTORY_SECRET", "hidden")
    assert "exit code 3" in failure_of(lambda: connect(engines.spec(threads=7))).parameters["reason"]
    environment, path = json.loads(report.read_text())
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("7", "passive")
    assert "PYTHON_WORKER_FACTORY_SECRET" not in environment
    assert path[0] == str(engines.tmp)
    assert path.index(os.getcwd()) > path.index(sysconfig.get_path("purelib")), "nothing there can shadow a package"


def test_folders_that_others_can_enter_are_refused(engines: Engines) -> None:
    root = engines.tmp / f"spark-llm-{os.getuid()}"
    root.mkdir()
    root.chmod(0o755)
    failure = failure_of(lambda: connect(engines.spec()))
    assert failure.condition == "LLM_ENGINE_FOLDER_UNSAFE"
    assert str(failure.parameters["reason"]) == "is open to other users (mode 755)"
    root.rmdir()
    (engines.tmp / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(engines.tmp / "elsewhere")
    assert failure_of(lambda: connect(engines.spec())).parameters["reason"] == "is not a folder"
    assert engines.living() == []


def test_the_folders_of_engines_are_private(engines: Engines) -> None:
    folder = folders.engine_folder(process.owner(), "0123456789abcdef")
    for place in (folder.path, folder.path.parent, folder.path.parent.parent):
        assert place.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(folder.new_socket())) <= folders.SOCKET_PATH_LIMIT


def test_a_long_temporary_folder_is_not_used(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 100 * "x")
    assert [root.parent for root in folders.roots()] == [Path("/tmp")]


def test_what_killed_engines_leave_behind_goes_after_a_day(engines: Engines) -> None:
    me = process.owner()
    gone = process.ProcessId(me.pid, me.start - 1)
    for owner in (me, gone):
        folder = folders.engine_folder(owner, "key")
        folder.log.write_text("its last words")
    folders.sweep()
    assert folders.engine_folder(gone, "key").log.exists()
    old = folders.KEEP_SECONDS + 60
    for owner in (me, gone):
        log = folders.engine_folder(owner, "key").log
        os.utime(log, (log.stat().st_mtime - old, log.stat().st_mtime - old))
    folders.sweep()
    assert [path.name for path in (engines.tmp / f"spark-llm-{os.getuid()}").iterdir()] == [str(me)]


def log_of(spec: Any) -> str:
    return folders.engine_folder(process.owner(), spec.key).log.read_text()


def test_an_engine_without_memory_ends_idle_ones_of_its_executor_and_names_busy_ones(engines: Engines) -> None:
    beside = connect(engines.spec(max_running_rows=4))
    hungry = engines.spec(kv_cache_memory=1 << 60)
    with beside.stream(engines.header(max_tokens=4096)) as stream:
        stream.send(engines.rows(range(1)))
        busy = failure_of(lambda: launch.ensure(hungry, 60.0))
        assert busy.condition == "LLM_NO_MEMORY_BESIDE"
        assert busy.parameters["others"] == engines.model
        assert "kvCacheMemory" in str(busy)
    with process.watching(ProcessId.of(beside.status().pid) or pytest.fail("the engine is gone")) as watch:
        idle = failure_of(lambda: launch.ensure(hungry, 60.0))
        assert idle.condition == "LLM_NO_MEMORY"
        assert watch.wait(30.0), "an idle engine makes room"
