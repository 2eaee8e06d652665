"""The solver: nothing lost, close to the oracle, better than GGR and one order, and at ease with any table."""

from __future__ import annotations

import datetime
import decimal
import math
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.errors import LlmError
from spark_llm.optimizer.reorder import measure, solve
from spark_llm.optimizer.reorder.codes import encode
from spark_llm.optimizer.reorder.ggr import ggr_cells
from spark_llm.optimizer.reorder.groups import Taking, fixed_order, group_orders
from spark_llm.optimizer.reorder.oracle import ophr
from spark_llm.optimizer.reorder.solver import Solution, prefix_rows, solve_cells

values = st.one_of(st.none(), st.sampled_from(["a", "bb", "ccc", ""]), st.integers(0, 3))
tables = st.integers(0, 5).flatmap(
    lambda fields: st.lists(st.lists(values, min_size=fields, max_size=fields), max_size=20).map(
        lambda rows: (fields, rows)
    )
)


def bag(rows: Any) -> list[list[str]]:
    """Rows without any order, comparable whatever they hold."""
    return sorted(sorted(f"{field!r}: {type(value).__name__} {value!r}" for field, value in row) for row in rows)


def frame(rows: list[list[Any]], fields: int) -> pd.DataFrame:
    return pd.DataFrame(
        {f"f{number}": pd.Series([row[number] for row in rows], dtype=object) for number in range(fields)}
    )


@given(tables)
@settings(deadline=None)
def test_nothing_is_lost(table: tuple[int, list[list[Any]]]) -> None:
    fields, rows = table
    given_rows = [[(f"f{number}", value) for number, value in enumerate(row)] for row in rows]
    schedule = solve(frame(rows, fields))
    if fields:
        assert bag(schedule) == bag(given_rows)
        assert measure.phc(schedule) >= measure.phc(sorted(given_rows, key=str))
    assert schedule == solve(frame(rows, fields))


@given(st.lists(st.tuples(*[st.sampled_from(["a", "bb", "cc", None])] * 3), min_size=1, max_size=30))
@settings(deadline=None)
def test_arrow_and_pandas_tables_are_solved_alike(rows: list[tuple[Any, ...]]) -> None:
    columns = {f"f{number}": [row[number] for row in rows] for number in range(3)}
    assert solve(pa.table(columns)) == solve(pd.DataFrame(columns, dtype=object))


def small_tables(seed: int, count: int) -> list[list[list[tuple[str, str]]]]:
    """Tables of 8 x 4: independent, skewed or dependent fields, with values of mixed lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        columns = []
        for _ in range(4):
            kind, texts = rng.integers(4), [chr(97 + v) * int(rng.geometric(0.08)) for v in range(8)]
            if kind == 0 and columns:
                picked = np.array([hash_of(value, int(rng.integers(2, 9))) for value in columns[-1]])
            elif kind == 1:
                picked = np.minimum(rng.geometric(0.5, 8) - 1, 7)
            else:
                picked = rng.integers(0, int(rng.integers(1, 8)), 8)
            columns.append([texts[v] for v in picked])
        found.append([[(f"f{field}", value) for field, value in enumerate(row)] for row in zip(*columns, strict=True)])
    return found


def hash_of(value: str, modulus: int) -> int:
    return (len(value) * 7 + ord(value[0])) % modulus


def test_small_tables_come_close_to_the_oracle() -> None:
    ratios = []
    for rows in small_tables(seed=3, count=200):
        best = ophr(rows).phc
        found = measure.phc(solve(pd.DataFrame([dict(row) for row in rows])))
        ratios.append(found / best if best else 1.0)
    assert np.mean(ratios) >= 0.995
    assert np.quantile(ratios, 0.05) >= 0.97


def test_groups_alone_come_close_to_the_oracle_too() -> None:
    ratios = []
    for rows in small_tables(seed=4, count=200):
        coded = encode(pd.DataFrame([dict(row) for row in rows]))
        weights = coded.lengths**2
        orders = group_orders(coded.cells, weights, Taking(), fixed_order(coded.cells, weights))
        found = measured(coded.cells, coded.lengths, Solution(prefix_rows(coded.cells, orders), orders)).phc
        best = ophr(rows).phc
        ratios.append(found / best if best else 1.0)
    assert np.mean(ratios) >= 0.95


def measured(cells: Any, lengths: Any, solution: Solution) -> measure.CodedMeasure:
    return measure.measure_coded(cells, lengths[cells], solution.rows, solution.orders)


def numbered(columns: list[Any]) -> Any:
    """Columns of any codes as cells: numbers that no two fields share."""
    cells, start = [], 0
    for column in columns:
        cells.append(np.unique(column, return_inverse=True)[1] + start)
        start = int(cells[-1].max()) + 1
    return np.stack(cells, axis=1)


@pytest.fixture(scope="module")
def reviews() -> tuple[Any, Any]:
    """A made table of the kind that reviews are: products with a name, a brand and a number, users, marks, times."""
    rng = np.random.default_rng(11)
    rows = 6000
    product, user = (np.minimum(rng.random(rows) ** 2.5 * count, count - 1).astype(int) for count in (300, 700))
    columns = [user, rng.integers(0, rows, rows), rng.integers(0, 20, rows), rng.integers(0, 5, rows)]
    cells = numbered([*columns, product, product % 40, product * 3])
    span = [(3, 15), (10, 11), (5, 6), (3, 4), (8, 45), (6, 25), (3, 6)]
    lengths = np.empty(int(cells.max()) + 1)
    for field, (low, high) in enumerate(span):
        ids = np.unique(cells[:, field])
        lengths[ids] = rng.integers(low, high, len(ids))
    return cells, lengths


@pytest.mark.parametrize("label", [0, 16])
def test_a_table_of_reviews_shares_more_than_by_ggr_or_by_one_order(reviews: tuple[Any, Any], label: int) -> None:
    cells, lengths = reviews[0], reviews[1] + label
    ours = measured(cells, lengths, solve_cells(cells, lengths))
    order = np.tile(fixed_order(cells, lengths**2), (len(cells), 1))
    fixed = measured(cells, lengths, Solution(prefix_rows(cells, order), order))
    for other in (
        fixed,
        measured(cells, lengths, ggr_cells(cells, lengths, dependencies=[(4, 6)])),
        measured(
            cells,
            lengths,
            ggr_cells(
                cells,
                lengths,
                dependencies=[(4, 6)],
                row_depth=None,
                column_depth=None,
                stop_below=0,
                last_above=1,
            ),
        ),
    ):
        assert ours.phc >= other.phc
        assert ours.phr >= other.phr - 0.001
    assert ours.phr >= fixed.phr + 0.03


def test_disjoint_groups_are_all_found() -> None:
    rng = np.random.default_rng(5)
    columns = [np.arange(2000) + field * 10_000 for field in range(4)]
    for field in range(4):
        columns[field][field * 500 : field * 500 + 500] = field * 10_000 + 9_999
    cells = numbered(columns)[rng.permutation(2000)]
    lengths = np.full(int(cells.max()) + 1, 10.0)
    lengths[np.flatnonzero(np.bincount(cells.ravel()) == 500)] = 100
    assert measured(cells, lengths, solve_cells(cells, lengths)).phc == 4 * 499 * 100**2
    # So does GGR without its stops.
    stops_off: dict[str, Any] = {"row_depth": None, "column_depth": None, "stop_below": 0, "last_above": 1}
    assert measured(cells, lengths, ggr_cells(cells, lengths, **stops_off)).phc == 4 * 499 * 100**2


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=40), st.booleans())
@settings(deadline=None)
def test_ggr_loses_nothing_either(rows: list[tuple[int, ...]], stops: bool) -> None:
    cells = numbered(list(np.array(rows).T))
    lengths = np.arange(1.0, cells.max() + 2)
    options: dict[str, Any] = {} if stops else {"row_depth": None, "column_depth": None, "stop_below": 0}
    found = ggr_cells(cells, lengths, dependencies=[(0, 2)], **options)
    assert sorted(found.rows) == list(range(len(rows)))
    assert np.sort(found.orders, axis=1).tolist() == [[0, 1, 2, 3]] * len(rows)


def test_fields_that_determine_each_other_are_found_and_travel_together() -> None:
    rng = np.random.default_rng(2)
    key = rng.integers(0, 8, 400)
    table = pd.DataFrame({"id": key, "noise": rng.integers(0, 10**9, 400), "name": [f"a name of {k}" for k in key]})
    for row in solve(table):
        assert [field for field, _ in row][2] == "noise"


class TestAnyTable:
    def test_empty_ones(self) -> None:
        assert solve(pd.DataFrame()) == []
        assert solve(pd.DataFrame({"a": []})) == []
        assert solve(pd.DataFrame(index=range(3))) == [[], [], []]
        assert solve(pa.table({"a": pa.array([], pa.string())})) == []

    def test_one_row_and_one_column(self) -> None:
        assert bag(solve(pd.DataFrame({"a": ["x"], "b": [1]}))) == bag([[("a", "x"), ("b", 1)]])
        column = solve(pd.DataFrame({"a": ["x", "y", "x"]}))
        assert measure.phc(column) == 1

    @pytest.mark.parametrize("rows", [3, 1000])
    def test_all_equal_and_all_distinct(self, rows: int) -> None:
        equal = solve(pd.DataFrame({"a": ["xx"] * rows, "b": ["yyy"] * rows}))
        assert measure.phc(equal) == (4 + 9) * (rows - 1)
        distinct = pd.DataFrame({"a": np.arange(rows), "b": -1 - np.arange(rows)})
        assert bag(solve(distinct)) == bag([("a", n), ("b", -1 - n)] for n in range(rows))

    def test_null_is_a_value_of_its_own(self) -> None:
        table = pd.DataFrame({"a": [None, "", None, ""], "b": ["long text", "other text", "long text", "other text"]})
        schedule = solve(table)
        assert bag(schedule) == bag([("a", a), ("b", b)] for a, b in zip(table["a"], table["b"], strict=True))
        rows = solve(pd.DataFrame({"x": [1.5, math.nan, 1.5], "t": [pd.NaT, pd.Timestamp(0), pd.NaT]}))
        assert bag(rows) == bag([[("x", 1.5), ("t", None)]] * 2 + [[("x", None), ("t", pd.Timestamp(0))]])

    def test_values_come_back_as_they_were(self) -> None:
        mixed = [1, True, 1.0, "1", b"1", None, [1, 2], {"a": 1}, (1,), decimal.Decimal(1), datetime.date(2020, 1, 1)]
        table = pd.DataFrame({"m": pd.Series(mixed * 2, dtype=object), "n": [7] * 22})
        assert bag(solve(table)) == bag([("m", value), ("n", 7)] for value in mixed * 2)

    def test_columns_of_any_type(self) -> None:
        table = pd.DataFrame(
            {
                "category": pd.Categorical(["x", None, "x"]),
                "nullable": pd.array([1, None, 1], "Int64"),
                "text": pd.array(["a", None, "a"], "string"),
                "complex": [1j, 2j, 1j],
                "period": pd.period_range("2020", periods=3, freq="D"),
                "span": pd.to_timedelta([1, 2, 1], "s"),
            }
        )
        rows = solve(table)
        assert sorted(field for field, _ in rows[0]) == sorted(table.columns)
        assert bag([cell for cell in row if cell[0] in ("category", "nullable", "text")] for row in rows) == bag(
            [[("category", "x"), ("nullable", 1), ("text", "a")]] * 2
            + [[("category", None), ("nullable", None), ("text", None)]]
        )
        arrow = pa.table(
            {
                "list": [[1], None, [1]],
                "struct": [{"a": 1}, {"a": 1}, None],
                "dictionary": pa.array(["x", None, "x"]).dictionary_encode(),
                "nothing": pa.nulls(3),
                "when": pa.array([1, 2, None], pa.timestamp("us")),
            }
        )
        assert bag(solve(arrow)) == bag(row.items() for row in arrow.to_pylist())

    def test_chunked_columns(self) -> None:
        chunks = pa.table({"a": pa.chunked_array([["x", "y"], ["x", None], []])})
        assert bag(solve(chunks)) == bag([("a", value)] for value in ["x", "y", "x", None])

    def test_columns_of_the_same_name(self) -> None:
        table = pd.DataFrame([["x", 1], ["y", 2]], columns=["a", "a"])
        assert bag(solve(table)) == bag([[("a", "x"), ("a", 1)], [("a", "y"), ("a", 2)]])

    def test_cells_of_a_megabyte(self) -> None:
        long = "word " * 200_000
        table = pd.DataFrame({"a": [str(n) for n in range(8)], "b": [long, long + "!"] * 4})
        rows = solve(table)
        assert {row[0][0] for row in rows} == {"b"}
        assert measure.phc(rows) == 3 * len(long) ** 2 + 3 * (len(long) + 1) ** 2

    def test_five_hundred_columns(self) -> None:
        rng = np.random.default_rng(0)
        table = pd.DataFrame(rng.integers(0, 3, (60, 500)), columns=[f"c{n}" for n in range(500)])
        rows = solve(table)
        assert bag(rows) == bag(zip(table.columns, row, strict=True) for row in table.to_numpy().tolist())

    @pytest.mark.parametrize(("rows", "fields"), [(512, 2), (128, 8), (2, 500)])
    def test_tables_at_the_edge_of_what_is_looked_ahead_into(self, rows: int, fields: int) -> None:
        rng = np.random.default_rng(1)
        table = pd.DataFrame({f"c{n}": rng.permutation(np.arange(rows) // 2) for n in range(fields)})
        assert bag(solve(table)) == bag(zip(table.columns, row, strict=True) for row in table.to_numpy().tolist())

    def test_texts_that_are_not_unicode(self) -> None:
        assert bag(solve(pd.DataFrame({"a": ["\ud800", "b", "\ud800"]}))) == bag(
            [("a", text)] for text in ["\ud800", "\ud800", "b"]
        )

    def test_equal_texts_of_different_values_are_one_cell(self) -> None:
        rows = solve(pd.DataFrame({"a": [1.01, 2.0, 1.04, 2.02]}), render=lambda field, value: f"{value:.1f}")
        assert sorted(value for row in rows for _, value in row) == [1.01, 1.04, 2.0, 2.02]
        assert measure.phc(rows, render=lambda field, value: f"{value:.1f}") == 2 * 9

    def test_lengths_decide(self) -> None:
        table = pd.DataFrame({"a": ["x", "x", "y", "y"], "b": ["p", "q", "p", "q"]})
        assert solve(table, lengths=lambda text: 5 if text in "xy" else 1)[0][0][0] == "a"
        assert solve(table, lengths=lambda texts: [1 if text in "xy" else 5 for text in texts])[0][0][0] == "b"

    @pytest.mark.parametrize(
        "call",
        [
            lambda: solve([1, 2]),
            lambda: solve(None),
            lambda: solve(pd.DataFrame({"a": ["x"]}), lengths=lambda text: -1.0),
            lambda: solve(pd.DataFrame({"a": ["x"]}), render=lambda field, value: 3),
        ],
    )
    def test_what_cannot_be_solved_is_refused(self, call: Any) -> None:
        with pytest.raises(LlmError, match="LLM_INVALID_TABLE"):
            call()
