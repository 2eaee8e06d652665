"""The command line, and that what a Spark task imports of the service is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from spark_llm import __version__, cli
from spark_llm.engine.service import client
from spark_llm.engine.service.protocol import ClientStatus, EngineStatus

STATUS = EngineStatus(
    pid=11, owner=7, model="SmolLM2", dtype="float32", uptime=75.0, rows_answered=1200, prompt_tokens=400,
    cached_tokens=300, tokens_per_second=2100.4, waiting=5, running=3, free_pages=25, total_pages=100, streams=2,
)  # fmt: skip


def run(*arguments: str) -> list[str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_version() -> None:
    lines = run("version")
    assert lines[0] == f"spark-llm {__version__}"
    assert any(line.startswith("torch 2.") for line in lines)


def test_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "list_engines", lambda: [STATUS])
    head, row = run("engines")
    assert head.split("  ")[0] == "pid"
    assert row.split() == [
        "11",
        "7",
        "SmolLM2",
        "float32",
        "75",
        "s",
        "2",
        "5",
        "+",
        "3",
        "1,200",
        "2,100",
        "75",
        "%",
        "75",
        "%",
    ]
    clients = {"pool small": ClientStatus(1200.0, 2.5, 3, 1), "": ClientStatus(7.0, 1.0, 0, 2)}
    monkeypatch.setattr(client, "list_engines", lambda: [msgspec.structs.replace(STATUS, clients=clients)])
    lines = [line.split() for line in run("engines")[3:]]
    assert lines[0] == ["pid", "client", "weight", "service", "waiting", "+", "running"]
    assert lines[1:] == [["11", "-", "1", "7", "0", "+", "2"], ["11", "pool", "small", "2.5", "1,200", "3", "+", "1"]]
    monkeypatch.setattr(client, "list_engines", lambda: [STATUS])
    (line,) = run("engines", "--json")
    assert json.loads(line)["tokens_per_second"] == 2100.4
    monkeypatch.setattr(client, "list_engines", list)
    assert run("engines")[0].startswith("No engine of this user runs on this host")


def test_the_client_imports_neither_torch_nor_spark(tmp_path: Path) -> None:
    code = "import sys, spark_llm.engine.service.client; print([m for m in ('torch', 'pyspark') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "[]\n"
