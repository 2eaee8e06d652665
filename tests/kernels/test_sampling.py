"""Greedy is argmax; draws equal the definition, follow the distribution and do not hang on the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_llm.kernels import sampling
from spark_llm.kernels.sampling import sample
from spark_llm.kernels.sampling_reference import noise_reference, sample_reference

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 4096  # logits a program reads at a time: larger rows are joined of several


def greedy(logits: Tensor) -> list[int]:
    out = torch.full((len(logits),), -1, dtype=torch.int32, device=logits.device)
    sample(logits, None, None, None, None, None, out)
    tokens: list[int] = out.tolist()
    return tokens


class Rows:
    """Parameters of some rows. Values may be one for all rows, or one each."""

    def __init__(
        self, logits: Tensor, *, heat: object = 1.0, k: object = 0, p: object = 1.0, seed: object = None, at: object = 0
    ) -> None:
        self.logits = logits
        n = len(logits)

        def column(values: object, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(values, dtype=dtype, device=logits.device).expand(n).contiguous()

        self.heat = column(heat, torch.float32)
        self.k = column(k, torch.int32)
        self.p = column(p, torch.float32)
        self.seed = column(range(n) if seed is None else seed, torch.int64)
        self.at = column(at, torch.int32)

    def draw(self) -> list[int]:
        out = torch.full((len(self.logits),), -1, dtype=torch.int32, device=self.logits.device)
        sample(self.logits, self.heat, self.k, self.p, self.seed, self.at, out)
        tokens: list[int] = out.tolist()
        return tokens

    def reference(self) -> list[int]:
        tokens: list[int] = sample_reference(self.logits, self.heat, self.k, self.p, self.seed, self.at).tolist()
        return tokens


def draw_logits(rows: int, vocabulary: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    return (3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))).to(dtype).to(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 7), (3, BLOCK), (2, 4 * BLOCK + 5), (40, 300)])
def test_greedy_is_the_first_of_the_greatest(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    logits = draw_logits(rows, vocabulary, dtype, rows, device)
    logits[-1, vocabulary // 3 :: max(1, vocabulary // 3)] = 15.0  # ties across blocks
    rows_as_lists = logits.float().cpu().numpy()
    assert greedy(logits) == rows_as_lists.argmax(-1).tolist()


def test_greedy_of_what_is_no_number(device: str) -> None:
    inf, nan = math.inf, math.nan
    rows = [[nan, 1.0, 2.0], [-inf, -inf, -inf], [nan, nan, nan], [-inf, inf, inf], [-3.0, nan, -2.0]]
    assert greedy(torch.tensor(rows, device=device)) == [2, 0, 0, 1, 2]


@pytest.mark.parametrize("programs", [1, 2, 1024])
def test_rows_are_cut_for_few_or_many_programs_alike(
    programs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = draw_logits(1, 3 * BLOCK + 7, torch.bfloat16, 8, device)
    rows = Rows(logits, heat=2.0, seed=5)
    drawn = rows.draw()
    logits[0, [5, 5 + BLOCK, 4 + 2 * BLOCK, 5 + 3 * BLOCK - 1]] = 30.0
    monkeypatch.setattr(sampling, "_PROGRAMS", programs)
    assert greedy(logits) == [5]
    logits[0, [5, 5 + BLOCK, 4 + 2 * BLOCK, 5 + 3 * BLOCK - 1]] = -math.inf
    assert drawn[0] not in (5, 5 + BLOCK, 4 + 2 * BLOCK, 4 + 3 * BLOCK), "else choose another seed"
    assert rows.draw() == drawn == rows.reference()


# temperature, top_k, top_p
SETTINGS = [
    (0.0, 3, 0.1), (1.0, 0, 1.0), (1.0, 0, 0.5), (0.7, 5, 1.0), (1.0, 5, 0.9), (2.0, 1, 1.0), (1.0, 10**6, 0.95),
    (0.1, 0, 0.3), (1e-30, 7, 0.01), (1e4, 50, 0.95), (1.0, 0, 0.0), (1.0, 0, 1 - 2**-24),
]  # fmt: skip


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(3, torch.float32), *((150, dtype) for dtype in FLOATS), (BLOCK + 9, torch.bfloat16)]
)
def test_draws_are_those_of_the_definition(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """Ties are many in half precision, and so at the borders of top-k and top-p."""
    heat, k, p = map(list, zip(*SETTINGS, strict=True))
    n = len(SETTINGS)
    logits = draw_logits(n, vocabulary, dtype, vocabulary, device)
    logits[:, ::3] = -math.inf  # masked tokens
    logits[4:7] = logits[4:7].round()  # ties in float32 too
    rows = Rows(logits, heat=heat, k=k, p=p, seed=[i * 1234567890123 - 5 for i in range(n)], at=list(range(n)))
    found, expected = rows.draw(), rows.reference()
    agree = sum(a == b for a, b in zip(found, expected, strict=True))
    # float32 and float64 sums may differ in whether a border token is in; then once in a while it is drawn
    assert agree >= n - 1, (found, expected)
    assert torch.isfinite(logits.cpu()[range(n), found]).all()


def kept_tokens(rows: Rows) -> list[set[int]]:
    """By the kernel that finds where they end."""
    n, vocabulary = rows.logits.shape
    cut = torch.empty(n, dtype=torch.int64, device=rows.logits.device)
    last_tie = torch.empty(n, dtype=torch.int32, device=rows.logits.device)
    best = rows.logits.float().amax(-1)
    unused = sampling._UNUSED_BITS[rows.logits.dtype]
    sampling._cut[(n,)](
        rows.logits, best, rows.heat, rows.k, rows.p, cut, last_tie, vocabulary, UNUSED=unused, BLOCK=BLOCK
    )
    bits = (rows.logits.float().cpu().numpy() + np.float32(0.0)).view(np.uint32)  # -0 + 0 is 0
    keys = np.where(bits >> 31, ~bits, bits | 0x80000000) >> unused
    kept = keys > cut.cpu().numpy()[:, None]
    tied = (keys == cut.cpu().numpy()[:, None]) & (np.arange(vocabulary) <= last_tie.cpu().numpy()[:, None])
    return [set(np.flatnonzero(row).tolist()) for row in kept | tied]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    vocabulary=st.sampled_from([1, 2, 30, 31, BLOCK + 40]), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99),
    step=st.sampled_from([0.0, 0.5, 2.0]), k=st.lists(st.integers(0, 33), min_size=6, max_size=6),
    p=st.lists(st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 0.999, 1.0]), min_size=6, max_size=6),
)  # fmt: skip
def test_what_is_kept_is_the_smallest_set(
    vocabulary: int, dtype: torch.dtype, seed: int, step: float, k: list[int], p: list[float], device: str
) -> None:
    """Rounded to steps, logits tie within blocks and across them."""
    logits = draw_logits(6, vocabulary, torch.float32, seed, device)
    logits = ((logits / step).round() * step if step else logits).to(dtype)
    found = kept_tokens(Rows(logits, k=k, p=p))
    for row, row_k, row_p, kept in zip(logits.double().cpu(), k, p, found, strict=True):
        values, order = row.sort(descending=True, stable=True)
        limit = row_k or vocabulary
        values, order = values[:limit], order[:limit]
        share = values.softmax(-1).cumsum(-1)
        bounds = [int(torch.searchsorted(share, max(row_p + slack, 0.0))) + 1 for slack in (-1e-6, 1e-6)]
        least, most = (set(order[:bound].tolist()) for bound in (bounds if row_p < 1 else (limit, limit)))
        assert least <= kept <= most


def test_a_draw_hangs_on_seed_and_position_only(device: str) -> None:
    logits = draw_logits(6, 500, torch.float32, 1, device)
    options = {"heat": [1.0, 0.0, 1.0, 1.0, 3.0, 1.0], "k": [0, 0, 9, 0, 40, 0], "p": [1.0, 1.0, 1.0, 0.8, 0.9, 1.0]}
    seed, at = [3, -3, 2**40, -(2**62), 5, 6], [0, 1, 2, 3, 4, 5]
    together = Rows(logits, seed=seed, at=at, **options).draw()
    back = list(reversed(range(6)))
    reversed_rows = Rows(
        logits[back], seed=seed[::-1], at=at[::-1], **{name: values[::-1] for name, values in options.items()}
    )
    assert reversed_rows.draw() == together[::-1]
    for i in range(6):
        alone = Rows(logits[i : i + 1], seed=seed[i], at=at[i], **{name: v[i] for name, v in options.items()})
        assert alone.draw() == [together[i]]
    same = logits[:1].expand(8, -1).contiguous()
    assert len(set(Rows(same, seed=7, at=7).draw())) == 1
    assert len(set(Rows(same, seed=7, at=list(range(8))).draw())) > 4
    assert len(set(Rows(same, at=7).draw())) > 4
    high = [i << 32 for i in range(8)]
    assert len(set(Rows(same, seed=high).draw())) > 4, "the upper half of a seed counts too"


def test_draws_follow_the_distribution(device: str) -> None:
    """Of the definition where kernels are interpreted: those are as slow as they are alike."""
    draws = 3_000 if device == "cpu" else 50_000
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = probabilities.log().expand(draws, -1).contiguous().to(device)
    rows = Rows(logits)
    counts = np.bincount(rows.reference() if device == "cpu" else rows.draw(), minlength=5)
    expected = probabilities.numpy() * draws
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi square with 4 degrees of freedom: p = 0.001


def test_noise_is_gumbel_and_independent() -> None:
    ids = torch.arange(200_000)
    first, second = noise_reference(1, 0, ids).numpy(), noise_reference(1, 1, ids).numpy()
    for noise in (first, second):
        uniform = np.sort(np.exp(-np.exp(-noise)))
        distance = np.abs(uniform - (np.arange(len(uniform)) + 0.5) / len(uniform)).max()
        assert distance < 1.95 / math.sqrt(len(uniform))  # Kolmogorov-Smirnov, p = 0.001
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.01
        assert abs(np.corrcoef(noise[1024:], noise[:-1024])[0, 1]) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert noise_reference(2, 0, ids[:50]).tolist() != noise_reference(1, 0, ids[:50]).tolist()


def test_noise_is_the_published_philox() -> None:
    """numpy's generator is another Philox (4x64); Random123's known answers are the check of ours."""
    # philox4x32 10, counter and key 0 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    for quarter, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        noise = float(noise_reference(0, 0, torch.tensor([quarter * BLOCK // 4])))
        assert noise == pytest.approx(-math.log(-math.log1p(-(word + 0.5) / 2**32)), abs=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
def test_a_graph_replays_draws() -> None:
    rows = Rows(draw_logits(8, 20_000, torch.bfloat16, 2, "cuda"), k=[0, 5] * 4, p=[1.0, 0.9, 0.5, 1.0] * 2)
    out = torch.zeros(8, dtype=torch.int32, device="cuda")
    arguments = (rows.logits, rows.heat, rows.k, rows.p, rows.seed, rows.at, out)
    expected = rows.draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(*arguments)
    out.fill_(-1)
    graph.replay()
    assert out.tolist() == expected
