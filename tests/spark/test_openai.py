"""``spark.llm.backend=openai`` end to end: Spark against our own ``spark-llm serve``, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession

import spark_llm
from spark_llm.engine.service.client import list_engines

pytestmark = [pytest.mark.spark, pytest.mark.model]

KEY = "key-that-nobody-may-see-0001"
ASK = "llm('What is this? {}', thing, max_tokens => 6)"
THINGS = ("a pear", "a drum", "tin", "the sea")


class Server:
    """``spark-llm serve`` over a random model, at ``url``."""

    def __init__(self, model: str, keys: Path) -> None:
        options = ["--model", model, "--dtype", "float32", "--threads", "1", "--port", "0", "--api-key-file", str(keys)]
        command = [sys.executable, "-P", "-c", "from spark_llm.cli import main; main()", "serve", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        assert self.url.startswith("http://127.0.0.1:"), "the server did not start"

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"spark_llm_{name}")).rpartition(" ")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def model(random_model: str) -> str:
    """The model that the server has; its folder holds the server's key, too."""
    (Path(random_model.removeprefix("dummy:")) / "key").write_text(KEY)
    return random_model


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[Server]:
    found = Server(model, Path(model.removeprefix("dummy:")) / "key")
    yield found
    found.kill()


@pytest.fixture
def session(spark: SparkSession, server: Server, model: str) -> SparkSession:
    """A session that asks the server; the fixture's key lies in a file."""
    session = spark_llm.enable(
        spark.newSession(),
        backend="openai",
        backend_url=server.url,
        backend_key_file=str(Path(model.removeprefix("dummy:")) / "key"),
        cache_enabled=False,
        optimizer_statistics_enabled=False,
    )
    rows = [(number, THINGS[number % 4]) for number in range(40)]
    session.createDataFrame(rows, "id int, thing string").createOrReplaceTempView("things")
    return session


def answers(session: SparkSession, question: str = "now") -> dict[int, str | None]:
    return dict(session.sql(f"SELECT id, {ASK.format(question)} FROM things").collect())


def test_answers_are_those_of_the_built_in_engine(session: SparkSession, server: Server, model: str) -> None:
    before = server.metric("rows_answered_total")
    remote = answers(session)
    report = spark_llm.last_report(session)
    assert report is not None
    assert server.metric("rows_answered_total") - before == report.calls == len(THINGS)
    assert (report.duplicates, report.failed) == (36, 0)
    assert report.output_tokens == 6 * len(THINGS)
    assert report.prompt_tokens > report.computed_tokens  # as the server counts them
    session.conf.set("spark.llm.backend", "builtin")
    session.conf.set("spark.llm.model", model)
    session.conf.set("spark.llm.engine.dtype", "float32")
    assert answers(session) == remote
    local = spark_llm.last_report(session)
    assert local is not None
    assert local.prompt_tokens == report.prompt_tokens


def test_typed_answers_are_kept_to_their_types_by_the_server(session: SparkSession) -> None:
    session.conf.set("spark.llm.maxOutputLength", "40")
    query = "SELECT id, llm('Is it hard?', thing, returns => 'BOOLEAN') AS hard FROM things WHERE id < 4"
    rows = session.sql(query).collect()
    assert len(rows) == 4
    assert all(row.hard in (True, False) for row in rows)


def test_the_key_is_in_no_setting_and_no_log(
    session: SparkSession, server: Server, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert None not in answers(session, "the key").values()
    settings = dict(session.conf.getAll) | dict(spark.sparkContext.getConf().getAll())
    assert settings["spark.llm.backend.url"] == server.url
    assert KEY not in json.dumps(settings)
    plan = session._jvm.PythonSQLUtils.explainString(  # type: ignore[union-attr]
        session.sql(f"SELECT {ASK.format('x')} FROM things")._jdf.queryExecution(), "extended"
    )
    assert KEY not in plan
    processes = [Path(f"/proc/{status.pid}") for status in list_engines() if status.dtype == "remote"]
    (gateway,) = [process for process in processes if server.url.encode() in (process / "cmdline").read_bytes()]
    assert KEY.encode() not in (gateway / "cmdline").read_bytes()
    log = (gateway / "fd" / "2").resolve().read_text()
    assert "ready after" in log
    assert KEY not in log


def test_a_wrong_key_ends_the_query(session: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("key-that-nobody-knows-0002")
    session.conf.set("spark.llm.backend.keyFile", str(tmp_path / "wrong"))
    with pytest.raises(PythonException, match=r"LLM_BACKEND_REFUSED.*status 401"):
        answers(session)
    session.conf.set("spark.llm.backend.keyFile", str(tmp_path / "none"))
    with pytest.raises(PythonException, match="LLM_BACKEND_KEY_MISSING"):
        answers(session)


def test_rows_of_a_server_that_dies_are_nulls_or_the_querys_error(session: SparkSession, model: str) -> None:
    own = Server(model, Path(model.removeprefix("dummy:")) / "key")
    try:
        session.conf.set("spark.llm.backend.url", own.url)
        session.conf.set("spark.llm.backend.retries", "0")
        assert None not in answers(session).values()
        own.kill()
        assert set(answers(session, "later").values()) == {None}
        report = spark_llm.last_report(session)
        assert report is not None
        assert (report.failed, report.calls) == (len(THINGS), 0)
        session.conf.set("spark.llm.onError", "fail")
        with pytest.raises(PythonException, match=r"LLM_ROW_FAILED.*LLM_BACKEND_UNAVAILABLE"):
            answers(session, "at last")
    finally:
        own.kill()
