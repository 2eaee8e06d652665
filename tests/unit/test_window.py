"""Row order in a window: nothing lost, lexicographic, stable."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spark_llm.optimizer.reorder.window import prefix_order

matrices = arrays.arrays(np.int64, st.tuples(st.integers(0, 30), st.integers(0, 4)), elements=st.integers(0, 3))


@given(matrices)
@settings(deadline=None)
def test_it_is_a_stable_sort_of_all_rows(codes: np.ndarray) -> None:
    order = prefix_order(codes)
    assert order.tolist() == sorted(range(len(codes)), key=lambda row: (tuple(codes[row]), row))
