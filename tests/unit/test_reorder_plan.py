"""From sampled hashes to an order table: what it expects comes true, for rows that it did not see, too."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.optimizer.reorder.expected import Sample, distinct_in, numbered
from spark_llm.optimizer.reorder.fixed import best_fixed_order
from spark_llm.optimizer.reorder.measure import measure_coded
from spark_llm.optimizer.reorder.order_table import OrderTable
from spark_llm.optimizer.reorder.plan_order import plan_order
from spark_llm.optimizer.reorder.solver import prefix_rows, solve_cells


class MadeTable:
    """A table of codes with lengths, hashes and cells. ``columns``: for each field its codes, and from which to which
    length its values are."""

    def __init__(self, columns: list[tuple[Any, tuple[int, int]]], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        numbers, lengths, start = [], [], 0
        for codes, (low, high) in columns:
            numbers.append(numbered(codes)[0] + start)
            start = int(numbers[-1].max()) + 1
            lengths.append(rng.integers(low, high, start - sum(map(len, lengths))).astype(np.float64))
        self.cells = np.stack(numbers, axis=1)[rng.permutation(len(columns[0][0]))]
        self.length_of = np.concatenate(lengths)
        self.lengths = self.length_of[self.cells]
        self.hashes = rng.integers(0, 2**64, start, dtype=np.uint64)[self.cells]

    def __len__(self) -> int:
        return len(self.cells)

    def hits(self, table: OrderTable) -> float:
        """The hit rate of all rows when every row is ordered by the table and rows are sorted."""
        orders = table.orders(self.hashes)
        return measure_coded(self.cells, self.lengths, prefix_rows(self.cells, orders), orders).phr

    def solved(self) -> float:
        found = solve_cells(self.cells, self.length_of)
        return measure_coded(self.cells, self.lengths, found.rows, found.orders).phr


def zipf(rng: np.random.Generator, rows: int, values: int) -> Any:
    return np.minimum(rng.random(rows) ** 2.5 * values, values - 1).astype(int)


def products(rows: int, seed: int = 1) -> MadeTable:
    """Reviews of products with long descriptions: the best order is one for all."""
    rng = np.random.default_rng(seed)
    product = zipf(rng, rows, 800)
    return MadeTable(
        [
            (np.arange(rows), (30, 120)),
            (product, (10, 60)),
            (product + 5000, (100, 400)),
            (product % 25, (10, 30)),
            (zipf(rng, rows, 3000), (8, 20)),
            (rng.integers(0, 5, rows), (1, 3)),
        ]
    )


def sections(rows: int, seed: int = 2) -> MadeTable:
    """Rows of eight kinds; a kind repeats in one field, which is another one for each kind."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 8, rows)
    columns = [
        (np.where(kind == field, rng.integers(0, 30, rows), 1000 + rng.permutation(rows)), (8, 60))
        for field in range(8)
    ]
    return MadeTable(columns, seed)


def disjoint(rows_a_group: int = 500) -> MadeTable:
    rows = 4 * rows_a_group
    columns = [np.arange(rows) + 1 for _ in range(4)]
    for field in range(4):
        columns[field][field * rows_a_group : (field + 1) * rows_a_group] = 0
    table = MadeTable([(column, (10, 11)) for column in columns])
    heavy = np.bincount(table.cells.ravel()) == rows_a_group
    table.length_of[heavy] = 100
    table.lengths = table.length_of[table.cells]
    return table


@pytest.mark.parametrize("made", [products, sections])
def test_a_table_planned_from_a_sample_holds_for_all_rows(made: Any) -> None:
    table = made(60_000)
    sample = np.random.default_rng(7).choice(len(table), 8000, replace=False)
    decision = plan_order(table.hashes[sample], table.lengths[sample], total_rows=len(table))
    hits = table.hits(decision.table)
    assert hits >= table.solved() - 0.01
    assert decision.hits == pytest.approx(hits, abs=0.02)
    assert table.hits(OrderTable.fixed(range(table.cells.shape[1]))) == pytest.approx(decision.written_hits, abs=0.02)
    assert decision.hits >= decision.fixed_hits


def test_disjoint_groups_are_planned_at_their_optimum() -> None:
    table = disjoint()
    for rows in (2000, 400):
        decision = plan_order(table.hashes[:rows], table.lengths[:rows], total_rows=2000)
        assert decision.table.num_groups == 4
        assert table.hits(decision.table) == pytest.approx(table.solved())
        assert {group for group, _ in decision.cluster_hits} == {0, 1, 2, 3}
        assert sum(size for _, size in decision.cluster_hits) == pytest.approx(2000)
        assert all(size == pytest.approx(500, abs=120) for _, size in decision.cluster_hits)


def test_groups_can_be_forbidden_and_are_not_made_for_nothing() -> None:
    table = disjoint()
    assert plan_order(table.hashes, table.lengths, may_group=False).table.num_groups == 0
    assert plan_order(*(part[:3000] for part in (products(3000).hashes, products(3000).lengths))).table.num_groups == 0


def test_the_same_arguments_make_the_same_table() -> None:
    table = sections(3000)
    one, other = (plan_order(table.hashes, table.lengths, total_rows=9000) for _ in range(2))
    assert one.table.encode() == other.table.encode()
    assert one == other


def test_statistics_are_of_the_whole_table() -> None:
    table = products(40_000)
    decision = plan_order(
        table.hashes[:4000], table.lengths[:4000], total_rows=40_000, distinct=[None] * 4 + [3000, None]
    )
    distinct = [field.distinct for field in decision.fields]
    assert distinct[0] == pytest.approx(40_000, rel=0.01)
    assert distinct[1] == pytest.approx(800, rel=0.05)
    assert distinct[4] == 3000
    assert decision.duplicates == pytest.approx(0, abs=0.001)
    assert decision.fields[2].length == pytest.approx(table.lengths[:4000, 2].mean())


def test_duplicates_are_expected_from_the_sample() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 500, 20_000)
    table = MadeTable([(rows, (5, 10)), (rows * 7, (5, 10))])
    assert plan_order(table.hashes, table.lengths).duplicates == pytest.approx(1 - 500 / 20_000)
    sampled = plan_order(table.hashes[:2000], table.lengths[:2000], total_rows=20_000)
    assert sampled.duplicates == pytest.approx(1 - 500 / 20_000, abs=0.01)


def test_distinct_values_are_extrapolated() -> None:
    rng = np.random.default_rng(0)
    for values in (20, 1000, 30_000):
        column = rng.integers(0, values, 100_000)
        counts = np.unique(column[:5000], return_counts=True)[1]
        assert distinct_in(counts, 100_000) == pytest.approx(len(np.unique(column)), rel=0.1)
        assert distinct_in(counts, 5000) == len(counts)
    assert distinct_in(np.ones(1000, np.int64), 10**6) == 10**6


@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=2, max_size=40),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=50)
def test_one_order_is_as_good_as_any_that_differs_by_one_move(rows: list[tuple[int, ...]], lengths: list[int]) -> None:
    codes = np.array(rows)
    sample = Sample(codes + 4 * np.arange(4), np.tile(np.array(lengths, np.float64), (len(rows), 1)), len(rows))
    found = best_fixed_order(sample, (np.arange(4),))
    best = sample.hits(np.tile(found, (len(rows), 1)))
    orders = np.tile(found, (len(rows), 1))
    expected = measure_coded(sample.cells, sample.lengths, prefix_rows(sample.cells, orders), orders).phr
    assert best == pytest.approx(expected, abs=1e-9), "of a whole table nothing is estimated"
    for source, target in itertools.product(range(4), range(4)):
        if target < source:
            order = found.tolist()
            order.insert(target, order.pop(source))
            assert sample.hits(np.tile(np.array(order), (len(rows), 1))) <= best + 0.02 + 1e-6


@pytest.mark.parametrize(("rows", "fields"), [(0, 3), (1, 3), (5, 1), (5, 0), (3, 80)])
def test_tables_of_any_shape_are_planned(rows: int, fields: int) -> None:
    hashes = np.arange(rows * fields, dtype=np.uint64).reshape(rows, fields) // 3
    decision = plan_order(hashes, np.ones((rows, fields)), total_rows=rows * 10)
    assert decision.table.num_fields == fields
    assert 0 <= decision.written_hits <= 1
    assert len(decision.fields) == fields


def test_cells_without_length_are_no_reason_to_fail() -> None:
    decision = plan_order(np.zeros((10, 2), np.uint64), np.zeros((10, 2)))
    assert (decision.hits, decision.table.num_groups) == (0, 0)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        plan_order(np.zeros((3, 2), np.uint64), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="do not fit"):
        plan_order(np.zeros((3, 2), np.uint64), np.zeros((3, 2)), distinct=[1])
