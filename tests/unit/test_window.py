"""Row order in a window: nothing lost, equal rows folded, lexicographic."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spark_llm.optimizer.reorder.window import prefix_order

matrices = arrays.arrays(np.int64, st.tuples(st.integers(0, 30), st.integers(1, 4)), elements=st.integers(0, 3))


@given(matrices)
@settings(deadline=None)
def test_folded_rows_get_the_call_of_an_equal_row(codes: np.ndarray) -> None:
    order, call = prefix_order(codes)
    assert len(call) == len(codes)
    for row in range(len(codes)):
        assert codes[order[call[row]]].tolist() == codes[row].tolist()


@given(matrices)
@settings(deadline=None)
def test_each_distinct_row_is_asked_once_by_its_first_occurrence(codes: np.ndarray) -> None:
    order, _ = prefix_order(codes)
    rows = [tuple(row) for row in codes.tolist()]
    assert sorted(order) == sorted(rows.index(row) for row in set(rows))


@given(matrices)
@settings(deadline=None)
def test_order_is_lexicographic(codes: np.ndarray) -> None:
    for fold in (True, False):
        asked = codes[prefix_order(codes, fold).order].tolist()
        assert asked == sorted(asked)


@given(matrices)
@settings(deadline=None)
def test_without_folding_it_is_a_stable_permutation(codes: np.ndarray) -> None:
    order, call = prefix_order(codes, fold=False)
    assert sorted(order) == list(range(len(codes)))
    assert order[call].tolist() == list(range(len(codes)))
    assert order.tolist() == sorted(range(len(codes)), key=lambda row: (tuple(codes[row]), row))
