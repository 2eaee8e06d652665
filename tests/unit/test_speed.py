"""Speeds of engines remembered in the user's cache folder, and what happens where that is not possible."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from spark_llm import speed

NAME = speed.engine_name("default", "auto", "auto", 0, "local[2]")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spark-llm" / "speeds.json"


def test_a_speed_is_found_again(file: Path) -> None:
    assert speed.remembered(NAME) is None
    speed.remember(NAME, 1234.56)
    speed.remember("another", 5.0)
    speed.remember(NAME, 1300.0)
    assert (speed.remembered(NAME), speed.remembered("another")) == (1300.0, 5.0)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [each.name for each in file.parent.iterdir()] == ["speeds.json"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"other": 1}', "\x00"])
def test_any_file_may_lie_there(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text, "utf-8")
    assert speed.remembered(NAME) is None
    speed.remember(NAME, 7.0)
    assert speed.remembered(NAME) == 7.0


@pytest.mark.parametrize("value", [None, "fast", 0, -1, float("inf"), float("nan")])
def test_a_speed_that_is_none_is_not_used(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({NAME: value}), "utf-8")
    assert speed.remembered(NAME) is None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    speed.remember(NAME, 7.0)
    assert speed.remembered(NAME) is None


def test_the_file_is_whole_whoever_writes(file: Path) -> None:
    def write(number: int) -> None:
        for _ in range(30):
            speed.remember(f"engine {number}", 1.0 + number)
            assert json.loads(file.read_text("utf-8"))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    known = json.loads(file.read_text("utf-8"))
    assert known
    assert all(known[f"engine {number}"] == 1.0 + number for number in range(4) if f"engine {number}" in known)


def test_few_speeds_are_kept(file: Path) -> None:
    for number in range(130):
        speed.remember(f"engine {number}", 1.0)
    known = json.loads(file.read_text("utf-8"))
    assert len(known) == 100
    assert "engine 129" in known


def test_what_makes_engines_alike() -> None:
    names = {
        NAME,
        speed.engine_name("other", "auto", "auto", 0, "local[2]"),
        speed.engine_name("default", "float32", "auto", 0, "local[2]"),
        speed.engine_name("default", "auto", "cuda", 0, "local[2]"),
        speed.engine_name("default", "auto", "auto", 1, "local[2]"),
        speed.engine_name("default", "auto", "auto", 0, "spark://host:7077"),
    }
    assert len(names) == 6
    assert speed.engine_name("default", "auto", "auto", 0, "local[*]") == NAME
