"""attend() against the definition in float64, and merge() against attention over the union of the keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_llm.kernels.attention import attend, attend_reference, merge


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread; on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in float64; seen: [M, L], or [R, 1, M, L]."""
    scores = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("function", [attend, attend_reference])
@pytest.mark.parametrize(
    ("queries", "keys", "how"),
    [
        (1, 1, "all"),
        (1, 77, "all"),
        (5, 300, "all"),
        (768, 9, "all"),
        (64, 64, "causal"),
        (1600, 40, "mask"),
        (9, 40, "mask"),
    ],
)
def test_attend_is_attention_with_its_log_sum_exp(function: type[attend], queries: int, keys: int, how: str) -> None:
    r, heads, dim = 3, 2, 16
    q, k, v = draw(1, r, heads, queries, dim), draw(2, r, heads, keys, dim), draw(3, r, heads, keys, dim)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if how == "causal":
        seen = seen.tril()[None, None].expand(r, 1, -1, -1)
    elif how == "mask":
        seen = draw(4, r, 1, queries, keys) > 0
        seen[..., 0] = True
    mask = None if how == "all" else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    out, lse = function(q, k, v, mask, scale=dim**-0.5)
    expected, expected_lse = exact(q, k, v, seen, dim**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_within_its_rounding(dtype: torch.dtype) -> None:
    q, k, v = (draw(i, 2, 3, 20, 16).to(dtype) for i in range(3))
    out, lse = attend(q, k, v, scale=0.25)
    expected, expected_lse = exact(q, k, v, torch.ones(20, 20, dtype=torch.bool), 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-2, atol=2e-2)


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    seed=st.integers(0, 10_000),
)
def test_merging_parts_is_attention_over_all_keys(cuts: list[int], scale: float, seed: int) -> None:
    """Exact for any cut of the keys, also where one part outweighs another by e^1000 (nothing overflows)."""
    total = sum(cuts)
    q, k, v = draw(seed, 1, 2, 4, 8), draw(seed + 1, 1, 2, total, 8), draw(seed + 2, 1, 2, total, 8)
    parts = [
        attend_reference(q, key, value, scale=scale)
        for key, value in zip(k.split(cuts, 2), v.split(cuts, 2), strict=True)
    ]
    out, lse = parts[0]
    for other in parts[1:]:
        out, lse = merge(out, lse, *other)
    expected, expected_lse = exact(q, k, v, torch.ones(4, total, dtype=torch.bool), scale)
    # A score of size s carries a float32 error of s * 2^-24, and so does everything that is made of it.
    size = float((q.double() @ k.double().transpose(-1, -2)).abs().max()) * scale
    tolerance = 1e-5 + 4 * size * 2**-23
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * float(v.abs().max()))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=tolerance)


def test_merge_is_symmetric_and_a_part_without_weight_changes_nothing() -> None:
    a, b = draw(0, 5, 8), draw(1, 5, 8)
    low, high = torch.full((5,), -1e4), draw(2, 5)
    torch.testing.assert_close(merge(a, high, b, low)[0], a, rtol=0, atol=0)
    torch.testing.assert_close(merge(a, high, b, low)[1], high, rtol=0, atol=0)
    one, other = merge(a, high, b, high + 1), merge(b, high + 1, a, high)
    torch.testing.assert_close(one, other)


def test_the_result_depends_on_every_key() -> None:
    """The comparison above can fail: one changed value is seen."""
    q, k, v = draw(1, 1, 1, 2, 8), draw(2, 1, 1, 50, 8), draw(3, 1, 1, 50, 8)
    changed = v.clone()
    changed[0, 0, 49, 0] += 1
    out, _ = attend(q, k, changed, scale=0.3)
    expected, _ = exact(q, k, v, torch.ones(2, 50, dtype=torch.bool), 0.3)
    assert not torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)
