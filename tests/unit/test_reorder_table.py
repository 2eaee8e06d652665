"""Order tables: hashes, orders as a pure function of a row, places in a shuffle, and bytes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.optimizer.reorder.hashing import hash_values
from spark_llm.optimizer.reorder.order_table import Group, OrderTable

# xxhash64(v) of Spark 4.3 as it prints it, for v STRING.
SPARK = {"a": -8582455328737087284, "Spark": -4294468057691064905, "": -7444071767201028348, None: 42}


def test_hashes_are_those_of_spark() -> None:
    found = hash_values(pa.array(list(SPARK), pa.string()))
    assert found.dtype == np.uint64
    assert found.view(np.int64).tolist() == list(SPARK.values())


def test_every_kind_of_string_array_hashes_alike() -> None:
    texts = ["a", None, "Spark", "a"]
    plain = pa.array(texts)
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0]), pa.array(texts[:3]))
    expected = [SPARK[text] for text in texts]
    for array in (plain, plain.cast(pa.large_string()), plain.dictionary_encode(), dictionary, plain.slice(0)):
        assert hash_values(array).view(np.int64).tolist() == expected
    assert hash_values(pa.chunked_array([plain[:1], plain[1:]])).view(np.int64).tolist() == expected
    assert hash_values(pa.chunked_array([], pa.string())).tolist() == []
    assert hash_values(plain[2:]).view(np.int64).tolist() == expected[2:]


@st.composite
def order_tables(draw: Any) -> OrderTable:
    fields = draw(st.integers(1, 5))
    order = st.permutations(range(fields)).map(tuple)
    groups: list[Group] = []
    levels: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        parents = [-1] + [number for number, level in enumerate(levels) if level < 2]
        group = Group(draw(st.sampled_from(parents)), draw(st.integers(0, fields - 1)), draw(values), draw(order))
        if group[:3] not in [other[:3] for other in groups]:
            groups.append(group)
            levels.append(levels[group.parent] + 1 if group.parent >= 0 else 0)
    return OrderTable(draw(order), groups)


values = st.integers(0, 3).map(lambda n: n * 2**62 + n)
rows_of_five = st.lists(st.lists(values, min_size=5, max_size=5), max_size=20)


def hashes_for(table: OrderTable, rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, np.uint64).reshape(len(rows), 5)[:, : table.num_fields]


def first_group(table: OrderTable, row: list[int]) -> list[int]:
    """The groups that hold a row, outermost first, by the rule as it is written down."""
    path: list[int] = []
    while True:
        parent = path[-1] if path else -1
        inside = [
            n for n, group in enumerate(table.groups) if group.parent == parent and row[group.field] == group.hash
        ]
        if not inside:
            return path
        path.append(inside[0])


@given(order_tables(), rows_of_five)
@settings(deadline=None)
def test_the_order_of_a_row_is_that_of_its_innermost_group(table: OrderTable, rows: list[list[int]]) -> None:
    hashes = hashes_for(table, rows)
    orders, placement = table.orders(hashes), table.place(hashes)
    assert orders.shape == hashes.shape
    for number, row in enumerate(hashes.tolist()):
        path = first_group(table, row)
        assert tuple(orders[number]) == (table.groups[path[-1]].order if path else table.default_order)
        assert placement.group[number] == (path[0] if path else -1)


@given(order_tables(), rows_of_five)
@settings(deadline=None)
def test_a_row_is_ordered_alike_in_any_company(table: OrderTable, rows: list[list[int]]) -> None:
    hashes = hashes_for(table, rows)
    alone = [table.place(hashes[number : number + 1]) for number in range(len(rows))]
    together = table.place(hashes)
    assert [place.key[0].tolist() for place in alone] == together.key.tolist()


@given(order_tables(), rows_of_five)
@settings(deadline=None)
def test_sorting_by_the_key_brings_equal_leading_cells_together_at_every_depth(
    table: OrderTable, rows: list[list[int]]
) -> None:
    hashes = hashes_for(table, rows)
    orders, placement = table.orders(hashes), table.place(hashes)
    sequence = sorted(range(len(rows)), key=lambda number: placement.key[number].tolist())
    cells = [[(int(field), int(hashes[n, field])) for field in orders[n]] for n in range(len(rows))]
    for depth in range(1, table.num_fields + 1):
        heads = [tuple(cells[number][:depth]) for number in sequence]
        runs = [head for place, head in enumerate(heads) if place == 0 or head != heads[place - 1]]
        assert len(runs) == len(set(runs))
    for one in range(len(rows)):
        for other in range(one):
            assert (placement.key[one, 0] == placement.key[other, 0]) == (cells[one][0] == cells[other][0])


@given(order_tables())
@settings(deadline=None)
def test_a_table_comes_back_from_its_bytes(table: OrderTable) -> None:
    again = OrderTable.decode(table.encode())
    assert again == table
    assert again.encode() == table.encode()
    assert again.groups == table.groups
    assert pickle.loads(pickle.dumps(table)) == table
    assert hash(again) == hash(table)


def test_a_fixed_order_has_no_groups() -> None:
    table = OrderTable.fixed([2, 0, 1])
    assert (table.num_groups, table.default_order) == (0, (2, 0, 1))
    assert table.orders(np.zeros((2, 3), np.uint64)).tolist() == [[2, 0, 1]] * 2
    assert table != OrderTable.fixed([0, 1, 2])


def test_keys_hold_sixteen_positions() -> None:
    table = OrderTable.fixed(range(40))
    assert table.place(np.zeros((3, 40), np.uint64)).key.shape == (3, 16)
    nothing = OrderTable.fixed([]).place(np.zeros((3, 0), np.uint64))
    assert nothing.key.shape == (3, 0)


@pytest.mark.parametrize(
    ("order", "groups", "message"),
    [
        ([0, 0], [], "permutation"),
        ([0, 1], [Group(-1, 0, 1, (1,))], "permutation"),
        ([0, 1], [Group(0, 0, 1, (0, 1))], "parent"),
        ([0, 1], [Group(-1, 0, 1, (0, 1))] * 2, "same"),
        ([0, 1], [Group(n - 1, 0, 1, (0, 1)) for n in range(4)], "nested"),
        ([0, 1], [Group(-1, 0, n, (0, 1)) for n in range(4097)], "at most"),
    ],
)
def test_tables_that_make_no_sense_are_refused(order: list[int], groups: list[Group], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrderTable(order, groups)


@pytest.mark.parametrize("data", [b"", b"not a table", OrderTable.fixed([0]).encode()[:-3]])
def test_bytes_that_are_no_table_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="order table"):
        OrderTable.decode(data)


def test_hashes_of_other_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="2 fields"):
        OrderTable.fixed([1, 0]).orders(np.zeros((3, 3), np.uint64))
