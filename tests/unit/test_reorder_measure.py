"""What a schedule is worth, and the oracle that knows the best one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.optimizer.reorder import measure
from spark_llm.optimizer.reorder.oracle import ophr

SCHEDULE = [
    [("a", "xx"), ("b", "yyy")],
    [("a", "xx"), ("b", "z")],
    [("b", "z"), ("a", "xx")],
    [("b", "z"), ("a", "xx")],
]

tables = st.lists(
    st.lists(st.sampled_from(["a", "bb", "ccc", "", None]), min_size=3, max_size=3), min_size=1, max_size=5
)


def rows_of(table: list[list[Any]]) -> list[list[tuple[str, Any]]]:
    return [[(f"f{number}", value) for number, value in enumerate(row)] for row in table]


def test_hits_are_leading_whole_cells_equal_to_the_row_before() -> None:
    assert measure.phc(SCHEDULE) == 4 + 0 + (1 + 4)
    assert measure.phr(SCHEDULE) == (2 + 0 + 3) / 14
    assert measure.phc([]) == measure.phr([]) == measure.cached_share([]) == 0


def test_a_cache_finds_what_any_earlier_row_left() -> None:
    schedule = [SCHEDULE[0], SCHEDULE[2], SCHEDULE[1]]
    assert measure.phr(schedule) == 0
    assert measure.cached_share(schedule) == 2 / 11


def test_lengths_are_asked_one_by_one_or_all_at_once() -> None:
    asked: list[Any] = []

    def all_at_once(texts: list[str]) -> list[int]:
        asked.append(texts)
        return [10 * len(text) for text in texts]

    assert measure.phc(SCHEDULE, lengths=len) == 9
    assert measure.phc(SCHEDULE, lengths=lambda text: 10 * len(text)) == 900
    assert measure.phc(SCHEDULE, lengths=all_at_once) == 900
    assert len(asked) == 2, "once to see that it takes lists, once for all texts"
    assert measure.phc(SCHEDULE, lengths=len, render=lambda field, value: f"{field}={value}\n") == 25 + 0 + 16 + 25


@pytest.mark.parametrize("bad", [lambda text: -1, lambda text: float("nan")])
def test_lengths_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="not negative"):
        measure.phc(SCHEDULE, lengths=bad)


@given(tables, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_codes_are_measured_as_schedules_are(table: list[list[Any]], random: Any) -> None:
    codes = np.array([[["a", "bb", "ccc", "", None].index(value) for value in row] for row in table])
    lengths = np.array([[len(value or "") for value in row] for row in table], np.float64)
    rows = random.sample(range(len(table)), len(table))
    orders = [random.sample(range(3), 3) for _ in table]
    schedule = [[(f"f{field}", table[row][field]) for field in orders[row]] for row in rows]
    found = measure.measure_coded(codes, lengths, np.array(rows), np.array(orders))
    assert found.phc == measure.phc(schedule)
    assert found.phr == pytest.approx(measure.phr(schedule))
    assert found.cached == pytest.approx(measure.cached_share(schedule))


def played_out(rows: list[list[tuple[str, Any]]]) -> float:
    """OPHR by its definition, without memory: choose a cell, its rows go first."""
    if len(rows) < 2 or not rows[0]:
        return 0.0
    best = 0.0
    for cell in {cell for row in rows for cell in row}:
        held = [[other for other in row if other[0] != cell[0]] for row in rows if cell in row]
        others = [row for row in rows if cell not in row]
        length = len(cell[1] or "")
        best = max(best, length * length * (len(held) - 1) + played_out(held) + played_out(others))
    return best


@given(tables)
@settings(deadline=None, max_examples=50)
def test_the_oracle_plays_the_published_recursion_out(table: list[list[Any]]) -> None:
    rows = rows_of(table)
    assert ophr(rows).phc == played_out(rows)


@given(tables)
@settings(deadline=None)
def test_the_oracle_has_a_schedule_for_what_it_promises(table: list[list[Any]]) -> None:
    rows = rows_of(table)
    optimum = ophr(rows)
    assert measure.phc(optimum.schedule) >= optimum.phc
    assert sorted(sorted(map(str, row)) for row in optimum.schedule) == sorted(sorted(map(str, row)) for row in rows)


@given(st.lists(st.lists(st.sampled_from(["a", "bb"]), min_size=2, max_size=2), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_no_schedule_of_one_field_order_beats_the_oracle(table: list[list[str]]) -> None:
    rows = rows_of(table)
    best = ophr(rows).phc
    for order in itertools.permutations(range(2)):
        assert measure.phc(sorted([row[field] for field in order] for row in rows)) <= best


def test_the_oracle_refuses_what_it_would_never_finish() -> None:
    with pytest.raises(ValueError, match="at most"):
        ophr(rows_of([["a"]] * 13))
