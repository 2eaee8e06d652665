"""The attention of a step equals dense attention row by row, on random trees, chunkings and page sizes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_llm.engine.cache.manager import CacheManager
from spark_llm.engine.model import blocks
from spark_llm.engine.model.attention import StepAttention
from spark_llm.engine.model.blocks import AttentionPlan, BlockBatch, plan_attention, slots
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.scheduling.row import Scheduled
from spark_llm.engine.scheduling.scheduler import Scheduler
from spark_llm.engine.scheduling.waiting import LongestPrefixFirst

DIM = 8

# Trees of prompts as (prefix to continue, its length, own tail): long runs, branches at every depth, equal rows.
PROMPTS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 60), st.integers(0, 30), st.integers(0, 1)), min_size=1, max_size=9
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread; on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grow(shape: list[tuple[int, int, int, int]]) -> list[list[int]]:
    prompts: list[list[int]] = []
    for parent, keep, tail, letter in shape:
        prefix = prompts[parent % len(prompts)][:keep] if prompts else [9] * keep
        prompts.append([*prefix, *([letter] * tail), 5])
    return prompts


def steps(
    prompts: list[list[int]], *, page_size: int, batch: int, late: int = 0
) -> Iterator[tuple[list[Scheduled], Scheduler]]:
    """Every step of answering the prompts, as the scheduler would plan them, one at a time."""
    scheduler = Scheduler(
        CacheManager(2000 // page_size, page_size), LongestPrefixFirst(), max_batch_tokens=batch, max_running_rows=64
    )
    requests = [Request(i, np.array(p, np.int32), SamplingParams(max_tokens=3)) for i, p in enumerate(prompts)]
    for request in requests[late:]:
        scheduler.add(request)
    planned = 0
    while len(scheduler) or planned < 2:
        if planned == 2:
            for request in requests[:late]:
                scheduler.add(request)
        planned += 1
        plan = scheduler.plan()
        if plan.num_rows:
            yield plan.shares(), scheduler
            scheduler.commit(plan, np.full(plan.num_sampled, 7, np.int32), frozenset())


def offsets_of(rows: list[Scheduled]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([s.count for s in rows])]).astype(np.int64)


def real_pairs(batch: BlockBatch) -> list[tuple[int, int]]:
    """(token of the step, slot) for each pair that the batch attends to, padding left out."""
    r, m = batch.queries.shape
    n = batch.keys.shape[1]
    hidden = np.zeros((r, m, n), bool) if batch.hidden is None else batch.hidden
    valid = set(range(r * m)) if batch.valid is None else set(batch.valid.tolist())
    return [
        (int(batch.queries[i, j]), int(batch.keys[i, key]))
        for i in range(r)
        for j in range(m)
        if i * m + j in valid
        for key in np.flatnonzero(~hidden[i, j])
    ]


def tokens_of(batch: BlockBatch) -> list[int]:
    flat = batch.queries.reshape(-1)
    return [int(t) for t in (flat if batch.valid is None else flat[batch.valid])]


def check_cover(plan: AttentionPlan, rows: list[Scheduled], offsets: np.ndarray, page_size: int) -> None:
    """Each query meets each of its keys once, and nothing else."""
    expected = Counter(
        (int(offsets[i]) + j, int(slot))
        for i, s in enumerate(rows)
        for j in range(s.count)
        for slot in slots(s.row, 0, s.start + j + 1, page_size)
    )
    assert Counter(pair for b in [*plan.own, *plan.shared] for pair in real_pairs(b)) == expected
    assert sorted(t for b in plan.own for t in tokens_of(b)) == list(range(offsets[-1]))
    for batch in plan.shared:
        assert len(set(tokens_of(batch))) == len(tokens_of(batch)), "a batch merges a token twice"


def dense(q: Tensor, k: Tensor, v: Tensor, rows: list[Scheduled], offsets: np.ndarray, page_size: int) -> Tensor:
    """By the definition, row by row, in float64."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for i, s in enumerate(rows):
        at = torch.from_numpy(slots(s.row, 0, s.start + s.count, page_size))
        keys = k[at].double().repeat_interleave(group, 1).transpose(0, 1)
        values = v[at].double().repeat_interleave(group, 1).transpose(0, 1)
        queries = q[offsets[i] : offsets[i + 1]].double().transpose(0, 1)
        scores = queries @ keys.transpose(1, 2) * q.shape[2] ** -0.5
        unseen = torch.arange(len(at))[None] > torch.arange(s.start, s.start + s.count)[:, None]
        scores = scores.masked_fill(unseen, float("-inf"))
        out[offsets[i] : offsets[i + 1]] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


def check_attention(
    rows: list[Scheduled], scheduler: Scheduler, page_size: int, heads: int, kv_heads: int, *, cascade: bool
) -> AttentionPlan:
    """Plan and run one layer; what no row owns is NaN."""
    offsets = offsets_of(rows)
    plan = plan_attention(rows, offsets, page_size, cascade=cascade)
    check_cover(plan, rows, offsets, page_size)
    pool = scheduler.cache.pool
    generator = torch.Generator().manual_seed(len(rows))
    shape = (pool.total * page_size, kv_heads, DIM)
    k, v = torch.randn(shape, generator=generator) * 3, torch.randn(shape, generator=generator)
    free = pool.is_free(np.arange(pool.total, dtype=np.int32)).repeat(page_size)
    k[torch.from_numpy(free)] = v[torch.from_numpy(free)] = float("nan")
    q = torch.randn(int(offsets[-1]), heads, DIM, generator=generator) * 2
    step = StepAttention(plan, heads, kv_heads, DIM, torch.float32)
    out = step.run(q, k, v).view(-1, heads, DIM).double()
    torch.testing.assert_close(out, dense(q, k, v, rows, offsets, page_size), rtol=2e-5, atol=2e-5)
    return plan


@pytest.mark.parametrize("cascade", [True, False])
@settings(deadline=None, max_examples=120)
@given(
    shape=PROMPTS,
    page_size=st.sampled_from([1, 4, 16]),
    batch=st.sampled_from([1, 3, 17, 64, 1000]),
    heads=st.sampled_from([(2, 2), (3, 1), (6, 2)]),
    tile=st.sampled_from([1, 2, 8, 128]),
    min_shared=st.sampled_from([1, 8, 32]),
    late=st.integers(0, 4),
)
def test_attention_equals_dense_attention_row_by_row(
    cascade: bool,
    shape: list[tuple[int, int, int, int]],
    page_size: int,
    batch: int,
    heads: tuple[int, int],
    tile: int,
    min_shared: int,
    late: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "QUERY_TILE", tile)
        patch.setattr(blocks, "MIN_SHARED", min_shared)
        for at, (rows, scheduler) in enumerate(steps(grow(shape), page_size=page_size, batch=batch, late=late)):
            if at % max(1, 64 // batch) == 0:  # tiny chunks make many steps: look at some
                check_attention(rows, scheduler, page_size, *heads, cascade=cascade)


def test_without_cascade_nothing_is_shared() -> None:
    prompts = [[1] * 100 + [i] for i in range(4)]
    for rows, _ in steps(prompts, page_size=1, batch=1000):
        assert not plan_attention(rows, offsets_of(rows), 1, cascade=False).shared


def nth_step(n: int, prompts: list[list[int]], *, page_size: int, batch: int) -> tuple[list[Scheduled], Scheduler]:
    return next(itertools.islice(steps(prompts, page_size=page_size, batch=batch), n, None))


@pytest.mark.parametrize("step", [0, 1])
def test_a_shared_prefix_is_read_once_for_all_its_rows(step: int) -> None:
    """Keys read per step: the prefix once (by the row that computes it: once a tile), then each row's own."""
    prompts = [[1] * 200 + [2 + i] * 4 for i in range(8)]
    rows, _ = nth_step(step, prompts, page_size=1, batch=1000)
    plan = plan_attention(rows, offsets_of(rows), 1, cascade=True)
    assert sum(b.keys.size for b in [*plan.own, *plan.shared]) < 2 * (200 + 8 * 6) + 128


def test_prefixes_nest_to_any_depth() -> None:
    """Two levels of sharing make two levels of blocks, merged into the same tokens."""
    prompts = [[1] * 100 + [2 + i // 4] * 100 + [50 + i] for i in range(8)]
    rows, scheduler = nth_step(1, prompts, page_size=1, batch=5000)
    plan = check_attention(rows, scheduler, 1, 4, 2, cascade=True)
    merged = Counter(t for b in plan.shared for t in tokens_of(b))
    assert set(merged.values()) == {2}
    assert sum(b.keys.size for b in plan.shared) == 300


def test_a_run_that_was_split_for_a_row_of_the_past_is_still_one_block() -> None:
    """The tree holds two nodes, but the same rows stand on both."""
    prompts = [*([1] * 100 + [3 + i] for i in range(4)), [1] * 50 + [2]]
    for rows, scheduler in steps(prompts, page_size=1, batch=5000, late=4):
        plan = check_attention(rows, scheduler, 1, 4, 2, cascade=True)
        if len(rows) == 4 and all(s.count == 1 for s in rows):
            assert [node.end for node in scheduler.cache.tree.nodes()][:1] == [50]
            assert [b.keys.shape for b in plan.shared] == [(1, 100)]
            break
    else:
        pytest.fail("the four rows never decoded alone")


def test_a_long_chunk_is_cut_into_tiles_that_see_only_what_is_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "QUERY_TILE", 32)
    rows, scheduler = nth_step(1, [list(range(200))], page_size=4, batch=96)
    plan = check_attention(rows, scheduler, 4, 6, 2, cascade=True)
    assert {b.queries.shape[1] for b in plan.own} == {32}
    assert sorted(len({*b.keys[i]}) for b in plan.own for i in range(len(b.keys))) == [128, 160, 192]


def test_blocks_of_unlike_shape_are_not_padded_together() -> None:
    """One long row among many short ones costs its own area, not a multiple of it."""
    prompts = [[7] * 200, *([i + 10, 3] for i in range(60))]
    rows, _ = next(iter(steps(prompts, page_size=1, batch=5000)))
    plan = plan_attention(rows, offsets_of(rows), 1, cascade=True)
    area = sum(b.queries.size * b.keys.shape[1] for b in plan.own)
    assert area < 1.5 * (200 * 200 + 60 * 4) + 4096 * len(plan.own)
