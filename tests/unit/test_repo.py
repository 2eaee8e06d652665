"""The repository itself: links, the wheel, pins, the error catalogue, documents that keep up with code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from spark_llm import config, config_docs, errors

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("engine", "optimizer", "kernels", "datasets")
CODE = ("spark_llm", *LINKED)


def python_files() -> list[Path]:
    return [
        path
        for folder in (*CODE, "benchmarks", "docs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    ]


@pytest.mark.parametrize("name", LINKED)
def test_parts_are_relative_links_into_the_package(name: str) -> None:
    link = ROOT / "spark_llm" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built from a clean copy of the sources."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in CODE:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_installs_nothing_outside_the_package(wheel_names: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names if ".dist-info/" not in name} == {"spark_llm"}


def test_the_wheel_holds_every_module_and_data_file(wheel_names: set[str]) -> None:
    tracked = [path.relative_to(ROOT).as_posix() for path in python_files() if path.relative_to(ROOT).parts[0] in CODE]
    tracked += [f"datasets/data/{path.name}" for path in (ROOT / "datasets" / "data").iterdir() if path.is_file()]
    expected = {name if name.startswith("spark_llm/") else f"spark_llm/{name}" for name in tracked}
    expected |= {"spark_llm/error_conditions.json", "spark_llm/py.typed", "spark_llm/optimizer/catalyst/shim.java"}
    assert expected <= wheel_names


@pytest.mark.parametrize("name", LINKED)
def test_generic_names_are_not_ours(name: str) -> None:
    """As the console script and pytest run: no folder of the checkout is importable by its bare name."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s else None)"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stdout.startswith(str(ROOT / name))
    assert str(ROOT) not in sys.path


def test_importing_the_package_is_light() -> None:
    code = "import sys, spark_llm; print({'torch', 'pyspark', 'pandas', 'pyarrow', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_every_dependency_is_pinned_and_nothing_is_a_path_or_an_address() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    assert "torch==2.13.0" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {_canonical(re.split(r"[\s<>=!~\[;]", line)[0]) for group in groups for line in group}
    assert names <= {_canonical(line.split("==")[0]) for line in pins}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_modules_hold_one_idea_each() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in python_files() if (n := len(path.read_bytes().splitlines())) > 320
    }
    assert long == {}


def test_the_error_catalogue_is_whole_and_used() -> None:
    catalogue = errors.catalogue()
    assert {
        name: entry for name, entry in catalogue.items() if not re.fullmatch(r"[0-9A-Z]{5}", entry["sqlState"])
    } == {}
    used = {name for path in python_files() for name in re.findall(r"[\"'](LLM_[A-Z_]+)[\"']", path.read_text("utf-8"))}
    assert used - set(catalogue) == set(), "raised, but not in error_conditions.json"
    assert set(catalogue) - used == set(), "in error_conditions.json, but never raised"


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert [key for key in config.entries() if f"`{key}`" not in text] == []


def test_generated_references_are_up_to_date() -> None:
    generated = subprocess.run(
        [sys.executable, "-P", str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == config_docs.render()


def test_the_numbers_of_the_readme_are_those_of_its_picture() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    results = json.loads((ROOT / "docs" / "images" / "demo.json").read_text("utf-8"))
    queries = results["queries"].values()
    speed = [query["speedup"] for query in queries]
    hits = [query["ours"]["prefix_hit_rate"] for query in queries]
    assert f"{min(speed):.1f} to {max(speed):.1f} times less time a row" in text
    assert f"{100 * min(hits):.0f} to {100 * max(hits):.0f} % of the prompt tokens were reused" in text
    assert f"({results['seconds']:.0f} s in all, {sum(query['ours']['rows'] for query in queries)} rows)" in text
    same, compared = (sum(query[key] or 0 for query in queries) for key in ("same", "compared"))
    assert f"{same} of {compared} sampled rows" in text


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text("utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []
