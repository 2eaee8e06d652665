"""attend() and merge_parts() of random steps against attention by its definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_llm.engine.cuda.attention_plan import FIELDS, Device, Layout, Members, lay_out
from spark_llm.kernels.paged_attention import attend, merge_parts

NAN = float("nan")
CLOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclass
class Pool:
    """K and V [slots, kv heads, D] of rows that may share pages; what no row owns is NaN."""

    k: Tensor
    v: Tensor
    table: np.ndarray
    page_size: int

    def slots(self, lane: int, count: int) -> Tensor:
        at = np.arange(count)
        pages = self.table[lane, at // self.page_size].astype(np.int64)
        return torch.from_numpy(pages * self.page_size + at % self.page_size)


def make_pool(
    lengths: list[int], parents: list[tuple[int, int]], page_size: int, kv_heads: int, dim: int, dtype: torch.dtype,
    rng: np.random.Generator, device: str,
) -> Pool:  # fmt: skip
    """Row i has lengths[i] tokens; parents[i] = (row, tokens): its first tokens are those of an earlier row."""
    width = max(lengths) // page_size + 1
    pages = rng.permutation(len(lengths) * width + 3).astype(np.int32)
    table = pages[: len(lengths) * width].reshape(len(lengths), width).copy()
    for i, (parent, tokens) in enumerate(parents):
        table[i, : tokens // page_size] = table[parent, : tokens // page_size]
    draw = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    k = torch.full((len(pages) * page_size, kv_heads, dim), NAN)
    pool = Pool(k, k.clone(), table, page_size)
    for i, length in enumerate(lengths):
        owned = pool.slots(i, length)
        for held in (pool.k, pool.v):
            held[owned] = torch.randn(length, kv_heads, dim, generator=draw)
    pool.k, pool.v = pool.k.to(dtype).to(device), pool.v.to(dtype).to(device)
    return pool


def attend_reference(q: Tensor, pool: Pool, lanes: np.ndarray, positions: np.ndarray) -> Tensor:
    """Each token sees the keys of its lane up to its own position: float32 [T, heads, D]."""
    out = torch.empty(q.shape)
    group = q.shape[1] // pool.k.shape[1]
    for token, (lane, position) in enumerate(zip(lanes.tolist(), positions.tolist(), strict=True)):
        slots = pool.slots(lane, position + 1)
        k, v = (held.cpu()[slots].float().repeat_interleave(group, 1) for held in (pool.k, pool.v))
        scores = torch.einsum("hd,nhd->hn", q[token].cpu().float(), k) * q.shape[-1] ** -0.5
        out[token] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
    return out


def attended(q: Tensor, pool: Pool, layout: Layout, device: Device) -> Tensor:
    """The step's attention; workspaces and output begin as NaN, empty items lie between the others."""
    _, heads, dim = q.shape
    members = len(layout.parts)
    out = torch.full_like(q, NAN)
    part_out = torch.full((layout.most_parts, members, heads, dim), NAN, device=q.device)
    part_lse = torch.full((layout.most_parts, members, heads), NAN, device=q.device)
    table, order = (torch.from_numpy(array).to(q.device) for array in (pool.table, layout.order))
    for items, tile in (
        (layout.long, layout.long_tile), (layout.shared, device.shared_tile), (layout.own, device.own_tile)
    ):  # fmt: skip
        padded = np.zeros((2 * len(items) + 1, FIELDS), np.int32)
        padded[1::2] = items
        attend(
            q, pool.k, pool.v, table, order if items is layout.shared else None,
            torch.from_numpy(padded).to(q.device), out, part_out, part_lse,
            page_size=pool.page_size, scale=dim**-0.5, tile=tile,
        )  # fmt: skip
    merge_parts(part_out, part_lse, torch.from_numpy(layout.parts).to(q.device), out[:members])
    return out


SHAPES = [
    # page, group, kv heads, D, dtype, cascade
    (1, 1, 2, 64, torch.float32, True),
    (4, 3, 2, 64, torch.float32, True),
    (16, 4, 1, 80, torch.float32, True),
    (16, 8, 1, 128, torch.float32, False),
    (64, 4, 2, 64, torch.float16, True),
    (1, 8, 1, 64, torch.bfloat16, True),
    (4, 4, 1, 128, torch.bfloat16, False),
    (16, 3, 1, 80, torch.float16, True),
]


@pytest.mark.parametrize(("page", "group", "kv_heads", "dim", "dtype", "cascade"), SHAPES)
def test_random_steps_are_attended_as_defined(
    page: int, group: int, kv_heads: int, dim: int, dtype: torch.dtype, cascade: bool, device: str
) -> None:
    rng = np.random.default_rng(page * 1000 + group * 10 + dim)
    # rows under two levels of shared prefixes, two rows that share nothing, two prompt chunks, the second a first one
    top, middle = 128, 192
    ends = [[top, middle], [top, middle], [top, middle], [top, 0], [top, 0], [0, 0], [0, 0]]
    counts = [1, 1, 3, 1, 2, 1, 1]
    starts = [max(e) + int(rng.integers(0, 50)) for e in ends]
    starts[-1] = 0  # a row whose only key is its own
    members = Members(
        lane=np.arange(len(ends)),
        first=np.cumsum(counts) - counts,
        count=np.array(counts),
        start=np.array(starts),
        ends=np.array([[*e, 0, 0] for e in ends]),
    )
    short = sum(counts)
    long_rows = np.array([[short, 70, 7, 37], [short + 70, 33, 8, 0]])
    pool = make_pool(
        [*(s + c for s, c in zip(starts, counts, strict=True)), 107, 33],
        [(0, max(e) if i < 3 else e[0]) for i, e in enumerate(ends)] + [(7, 0), (8, 0)],
        page, kv_heads, dim, dtype, rng, device,
    )  # fmt: skip
    plan = Device(
        group=group, kv_heads=kv_heads, page_size=page, multiprocessors=4, min_shared=16, min_saved=0, split_keys=16,
        own_tile=16, cascade=cascade, splits=cascade,
    )  # fmt: skip
    layout = lay_out(members, long_rows, pool.table, plan)
    assert (layout.most_parts > 3) is cascade
    q = torch.randn(short + 103, group * kv_heads, dim, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    lanes = np.concatenate([np.repeat(members.lane, counts), np.full(70, 7), np.full(33, 8)])
    positions = np.concatenate([np.arange(s, s + c) for s, c in zip([*starts, 37, 0], [*counts, 70, 33], strict=True)])
    found = attended(q, pool, layout, plan).cpu().float()
    torch.testing.assert_close(found, attend_reference(q, pool, lanes, positions), rtol=0, atol=CLOSE[dtype])


@FEW
@given(
    keys=st.integers(1, 300), cuts=st.lists(st.integers(1, 299), max_size=6), tokens=st.integers(1, 4),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_split_of_the_keys_merges_to_the_same(
    keys: int, cuts: list[int], tokens: int, seed: int, device: str
) -> None:
    rng = np.random.default_rng(seed)
    pool = make_pool([keys], [(0, 0)], 4, 1, 64, torch.float32, rng, device)
    q = torch.randn(tokens, 4, 64, generator=torch.Generator().manual_seed(seed)).to(device)
    edges = sorted({0, keys, *(c for c in cuts if c < keys)})
    parts = len(edges) - 1
    spans = list(pairwise(edges))
    whole = np.array([[0, tokens, 0, 0, keys, -1, 0, 1]], np.int32)
    split = np.array([[0, tokens, 0, a, b, -1, i, 0] for i, (a, b) in enumerate(spans)], np.int32)
    table = torch.from_numpy(pool.table).to(device)
    order = torch.arange(tokens, dtype=torch.int32, device=device)

    def run(items: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.full_like(q, NAN)
        part_out = torch.full((parts, tokens, 4, 64), NAN, device=device)
        part_lse = torch.full((parts, tokens, 4), NAN, device=device)
        attend(
            q, pool.k, pool.v, table, order, torch.from_numpy(items).to(device), out, part_out, part_lse,
            page_size=4, scale=0.125, tile=16,
        )  # fmt: skip
        return out, part_out, part_lse

    once, untouched, _ = run(whole)
    assert untouched.isnan().all(), "a single part needs no workspace"
    out, part_out, part_lse = run(split)
    assert out.isnan().all(), "parts are not the output yet"
    merge_parts(part_out, part_lse, torch.full((tokens,), parts, dtype=torch.int32, device=device), out)
    if parts == 1:
        assert out.isnan().all(), "one part is already where it belongs"
        out = part_out[0]
    torch.testing.assert_close(out, once, rtol=0, atol=2e-6)


def test_scores_far_apart_stay_finite(device: str) -> None:
    rng = np.random.default_rng(3)
    pool = make_pool([200], [(0, 0)], 1, 1, 64, torch.float32, rng, device)
    pool.k *= 40
    q = 40 * torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(2)).to(device)
    members = Members(np.array([0]), np.array([0]), np.array([1]), np.array([199]), np.zeros((1, 4), np.int64))
    plan = Device(group=2, kv_heads=1, page_size=1, multiprocessors=4, split_keys=16, min_saved=0)
    reference = attend_reference(q, pool, np.array([0]), np.array([199]))
    for splits in (True, False):
        setting = replace(plan, splits=splits)
        layout = lay_out(members, np.empty((0, 4), np.int64), pool.table, setting)
        assert (layout.most_parts > 1) is splits
        torch.testing.assert_close(attended(q, pool, layout, setting).cpu(), reference, rtol=0, atol=1e-3)


def test_a_row_is_the_same_bits_with_and_without_others(device: str) -> None:
    """Without sharing and splits, what others compute changes nothing."""
    rng = np.random.default_rng(5)
    pool = make_pool([90, 75, 33], [(0, 0), (0, 32), (2, 0)], 16, 2, 64, torch.float32, rng, device)
    plan = Device(group=4, kv_heads=2, page_size=16, multiprocessors=8, cascade=False, splits=False)
    q = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(4)).to(device)
    none = np.empty((0, 4), np.int64)

    def run(rows: list[int]) -> Tensor:
        at = np.array(rows)
        members = Members(
            at, np.arange(len(at)), np.ones(len(at), np.int64), np.array([89, 74, 32])[at], np.zeros((len(at), 4), int)
        )
        return attended(q[rows], pool, lay_out(members, none, pool.table, plan), plan)

    together = run([0, 1, 2])
    for row in range(3):
        assert torch.equal(run([row])[0], together[row])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="numpy's products, in the interpreter, do hang on it")
@pytest.mark.parametrize(
    ("group", "dim", "dtype"), [(3, 64, torch.bfloat16), (4, 128, torch.bfloat16), (4, 64, torch.float32)]
)
def test_a_token_is_the_same_bits_wherever_its_tile_begins(
    group: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    """A prompt at once, in chunks as after a cached prefix, and token by token: by tiles of one size."""
    keys, tile = 300, 128
    rng = np.random.default_rng(6)
    pool = make_pool([keys], [(0, 0)], 1, 1, dim, dtype, rng, device)
    q = torch.randn(keys, group, dim, generator=torch.Generator().manual_seed(5)).to(dtype).to(device)
    table = torch.from_numpy(pool.table).to(device)
    nothing = torch.empty(0, device=device)

    def run(items: list[list[int]]) -> Tensor:
        out = torch.full_like(q, NAN)
        attend(
            q, pool.k, pool.v, table, None, torch.tensor(items, dtype=torch.int32, device=device), out,
            nothing, nothing, page_size=1, scale=dim**-0.5, tile=tile,
        )  # fmt: skip
        return out

    def chunks(*begins: int) -> list[list[int]]:
        spans = [
            (at, min(at + tile // group, end))
            for begin, end in pairwise([*begins, keys])
            for at in range(begin, end, tile // group)
        ]
        return [[at, end - at, 0, 0, end, at, 0, 1] for at, end in spans]

    whole = run(chunks(0))
    assert torch.equal(run(chunks(0, 37, 150, 151, 290)), whole)
    assert torch.equal(run([[at, 1, 0, 0, at + 1, -1, 0, 1] for at in range(keys)]), whole)
