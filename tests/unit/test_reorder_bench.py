"""The solver's benchmark: its tables are what they say, and its record becomes a table."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("reorder_tables")


@pytest.fixture
def solver(tables: ModuleType) -> ModuleType:
    return importlib.import_module("reorder_solver")


def test_large_tables_have_their_shapes(tables: Any) -> None:
    reviews = tables.large_table("reviews", 2000)
    assert reviews.shape == (2000, 9)
    assert reviews.groupby("name")["number"].nunique().max() == 1
    assert tables.large_table("wide", 500).shape == (500, 57)
    disjoint = tables.large_table("disjoint")
    assert [int(disjoint[name].value_counts().iloc[0]) for name in disjoint] == [500] * 4
    assert disjoint.equals(tables.large_table("disjoint"))


def test_small_tables_are_the_same_for_the_same_seed(tables: Any) -> None:
    for kind in tables.SMALL:
        one, other = (tables.small_table(kind, np.random.default_rng(1)) for _ in range(2))
        assert one == other
        assert (len(one), len(one[0])) == (8, 4)


def test_a_record_becomes_a_table(solver: Any, tables: Any) -> None:
    closeness = solver.closeness("dependent", 15)
    assert closeness.mean >= 0.98
    shared = solver.compare("disjoint", tables.large_table("disjoint"))
    by_method = {found.method: found for found in shared if found.table == "disjoint, values alone"}
    assert by_method["ours"].phc == by_method["GGR, stops off"].phc > 2 * by_method["one order by statistics"].phc
    record = {
        "machine": asdict(solver.this_machine()),
        "closeness": [asdict(closeness)],
        "shared": [asdict(found) for found in shared],
        "speed": [asdict(solver.timed("reviews", 1000, 1))],
    }
    text = solver.report(record)
    assert "dependent" in text
    assert text.count("disjoint") == len(shared)
