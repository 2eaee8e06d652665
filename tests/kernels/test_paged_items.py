"""attend() and merge_parts(), work item by work item, against their references; realistic sizes on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from spark_llm.kernels.paged_attention import attend, attend_reference, merge_parts, merge_parts_reference

NAN = float("nan")
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@st.composite
def item_lists(draw: st.DrawFn, tile: int, group: int) -> tuple[list[list[int]], list[int], int]:
    """Items over up to three lanes whose tokens are theirs alone, the lanes' lengths, and the number of tokens."""
    items: list[list[int]] = []
    lengths = [0, 0, 0]
    tokens = 0
    for _ in range(draw(st.integers(1, 4))):
        lane = draw(st.integers(0, 2))
        count = draw(st.integers(0, tile // group))
        start = draw(st.integers(0, 140))
        is_causal = draw(st.booleans())
        causal = start + draw(st.integers(0, 90)) if is_causal else -1
        # keys may end before the last query's own, as those of a split do, or go beyond
        stop = draw(st.integers(start + 1, start + 150))
        items.append([tokens, count, lane, start, stop, causal, draw(st.integers(0, 2)), draw(st.integers(0, 1))])
        lengths[lane] = max(lengths[lane], stop)
        tokens += count
        if draw(st.booleans()):
            items.append([0] * 8)
    return items, lengths, max(tokens, 1)


@FEW
@given(data=st.data())
def test_any_item_is_attended_as_defined(data: st.DataObject, device: str) -> None:
    page = data.draw(st.sampled_from([1, 2, 16, 64]), "page size")
    group = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16]), "group")
    dim = data.draw(st.sampled_from([32, 64, 80, 96, 128]), "dim")
    kv_heads = data.draw(st.integers(1, 2), "kv heads")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), "dtype")
    tile = data.draw(st.sampled_from([16, 32, 64]), "tile")
    gathers = data.draw(st.booleans(), "gathers")
    listed, lengths, tokens = data.draw(item_lists(tile, group), "items")
    seed = data.draw(st.integers(0, 99), "seed")

    width = max(lengths) // page + 1
    pages = np.random.default_rng(seed).permutation(3 * width + 2).astype(np.int32)
    table = torch.from_numpy(pages[: 3 * width].reshape(3, width).copy())
    k_pool = torch.full((len(pages) * page, kv_heads, dim), NAN, dtype=dtype)
    v_pool = k_pool.clone()
    for lane, length in enumerate(lengths):
        at = torch.arange(length)
        slots = table[lane, at // page].long() * page + at % page
        k_pool[slots] = draw((length, kv_heads, dim), seed + lane, dtype, "cpu")
        v_pool[slots] = draw((length, kv_heads, dim), seed + lane + 9, dtype, "cpu")
    k_pool, v_pool, table = k_pool.to(device), v_pool.to(device), table.to(device)
    q = draw((tokens, group * kv_heads, dim), seed, dtype, device)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).int().to(device) if gathers else None
    items = torch.tensor(listed, dtype=torch.int32, device=device)

    def empty() -> tuple[Tensor, Tensor, Tensor]:
        parts = (3, tokens, group * kv_heads)
        return (
            torch.full_like(q, NAN),
            torch.full((*parts, dim), NAN, device=device),
            torch.full(parts, NAN, device=device),
        )

    found, expected = empty(), empty()
    attend(q, k_pool, v_pool, table, order, items, *found, page_size=page, scale=dim**-0.5, tile=tile)
    attend_reference(q, k_pool, v_pool, table, order, items, *expected, page_size=page, scale=dim**-0.5)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=CLOSE[dtype], equal_nan=True)


@FEW
@given(
    parts=st.lists(st.integers(0, 5), min_size=1, max_size=6), heads=st.sampled_from([1, 3, 8]),
    dim=st.sampled_from([64, 80]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), spread=st.integers(1, 2000),
)  # fmt: skip
def test_parts_merge_as_defined(
    parts: list[int], heads: int, dim: int, dtype: torch.dtype, spread: int, device: str
) -> None:
    """Whatever the sizes of the parts' sums; what is no part is never read, and a token of one part never written."""
    tokens = len(parts)
    num_parts = torch.tensor(parts, dtype=torch.int32, device=device)
    unused = torch.arange(5, device=device)[:, None] >= num_parts[None]
    part_out = draw((5, tokens, heads, dim), 1, torch.float32, device)
    part_lse = draw((5, tokens, heads), 2, torch.float32, device) * spread
    part_out[unused], part_lse[unused] = NAN, NAN
    found = torch.full((tokens + 1, heads, dim), NAN, dtype=dtype, device=device)
    expected = found.clone()
    merge_parts(part_out, part_lse, num_parts, found)
    merge_parts_reference(part_out, part_lse, num_parts, expected)
    assert found[:tokens].isnan().all(-1).all(-1).tolist() == [count <= 1 for count in parts]
    # at a spread of 2,000 the lse itself is exact to 1e-4
    atol = CLOSE[dtype] + spread * 1e-6
    rtol = 2**-7 if dtype == torch.bfloat16 else 0.0  # a last bit: the interpreter cuts where hardware rounds
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("causal", [True, False])
def test_equal_rows_are_as_torch_attends(causal: bool, device: str) -> None:
    """Dense rows of one shape: what torch's own attention is for."""
    rows, length, heads, kv_heads, dim, tile = 2, 75, 6, 2, 64, 32
    q, k, v = (
        draw((rows, n, length, dim), n + i, torch.float32, device) for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    flat = [t.transpose(1, 2).reshape(rows * length, -1, dim).contiguous() for t in (q, k, v)]
    table = torch.arange(rows * length, dtype=torch.int32, device=device).view(rows, length)
    each = tile // (heads // kv_heads)
    items = torch.tensor(
        [
            [row * length + at, min(each, length - at), row, 0, length, at if causal else -1, 0, 1]
            for row in range(rows)
            for at in range(0, length, each)
        ],
        dtype=torch.int32,
        device=device,
    )
    out = torch.full_like(flat[0], NAN)
    none = torch.empty(0, device=device)
    attend(*flat, table, None, items, out, none, none, page_size=1, scale=dim**-0.5, tile=tile)
    found = out.view(rows, length, heads, dim).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("group", "dim", "page", "tile", "dtype"),
    [
        (4, 128, 1, 16, torch.bfloat16),
        (4, 128, 1, 128, torch.bfloat16),
        (4, 64, 16, 16, torch.bfloat16),
        (4, 64, 16, 128, torch.bfloat16),
        (8, 128, 64, 64, torch.bfloat16),
        (1, 96, 16, 64, torch.float16),
        (3, 64, 1, 16, torch.float32),
        (4, 128, 1, 128, torch.float32),
    ],
)
def test_realistic_sizes(group: int, dim: int, page: int, tile: int, dtype: torch.dtype) -> None:
    """Chunks of long prompts and prefixes that many queries share, in a pool of more than 2^31 elements."""
    kv_heads, lanes, keys = 8, 4, 3000
    width = keys // page + 1
    slots = (1 << 31) // (kv_heads * dim) + lanes * width * page
    k_pool = torch.empty(slots, kv_heads, dim, dtype=dtype, device="cuda")
    v_pool = torch.empty_like(k_pool)
    pages = slots // page - 1 - np.random.default_rng(0).permutation(lanes * width)  # the pool's end: beyond int32
    table = torch.from_numpy(pages.reshape(lanes, width).astype(np.int32)).cuda()
    at = torch.arange(width * page, device="cuda")
    for lane in range(lanes):
        owned = table[lane, at // page].long() * page + at % page
        k_pool[owned] = torch.randn(len(owned), kv_heads, dim, dtype=dtype, device="cuda")
        v_pool[owned] = torch.randn(len(owned), kv_heads, dim, dtype=dtype, device="cuda")
    each = tile // group
    rng = np.random.default_rng(1)
    listed = []
    for i in range(64):
        start = int(rng.integers(0, 2000)) if i % 2 else 0
        causal = int(rng.integers(start, keys - each)) if i % 3 else -1
        stop = causal + each if i % 3 else int(rng.integers(start + 1, keys))
        listed.append([i * each, each, i % lanes, start, stop, causal, i % 2, i % 4 // 2])
    items = torch.tensor(listed, dtype=torch.int32, device="cuda")
    q = torch.randn(64 * each, group * kv_heads, dim, dtype=dtype, device="cuda")
    results = []
    for kernel in (True, False):
        out = torch.full_like(q, NAN)
        part_out = torch.full((2, *q.shape), NAN, device="cuda")
        part_lse = torch.full((2, *q.shape[:2]), NAN, device="cuda")
        given = (q, k_pool, v_pool, table, None, items, out, part_out, part_lse)
        if kernel:
            attend(*given, page_size=page, scale=dim**-0.5, tile=tile)
        else:
            attend_reference(*given, page_size=page, scale=dim**-0.5)
        results.append((out, part_out, part_lse))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=CLOSE[dtype], equal_nan=True)
