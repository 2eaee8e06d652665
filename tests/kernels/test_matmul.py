"""The batch-invariant product: right, and every row the same bits whatever other rows there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_llm.kernels.matmul import matmul, matmul_reference

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# in the interpreter, a dot of bfloat16 multiplies the bits of its numbers
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 300), columns=st.integers(1, 300), inner=st.integers(1, 200), dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)  # fmt: skip
def test_any_shape_is_multiplied(
    rows: int, columns: int, inner: int, dtype: torch.dtype, has_bias: bool, device: str
) -> None:
    x = draw(rows, inner, seed=1, dtype=dtype, device=device)
    weight = draw(columns, inner, seed=2, dtype=dtype, device=device)
    bias = draw(columns, seed=3, dtype=dtype, device=device) if has_bias else None
    found = matmul(x, weight, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, matmul_reference(x, weight, bias), rtol=CLOSE[dtype], atol=CLOSE[dtype] * inner**0.5
    )


def row_by_row(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """A product whose rows do not know their place, as on tensor cores: BLAS's sums differ at a tile's edge."""
    return np.stack([(row @ b).astype(dtype) for row in a.astype(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_same_bits(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(np, "matmul", row_by_row)  # of the interpreter's dot
    x = draw(260, 200, seed=4, dtype=dtype, device=device)
    weight = draw(140, 200, seed=5, dtype=dtype, device=device)
    bias = draw(140, seed=6, dtype=dtype, device=device)
    together = matmul(x, weight, bias)
    for first, last in ((0, 1), (7, 8), (130, 131), (100, 259), (3, 260)):
        assert torch.equal(matmul(x[first:last].contiguous(), weight, bias), together[first:last])
