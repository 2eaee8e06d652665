"""Greedy is argmax; draws follow the distribution, keep to top_k and top_p, and hang on seed and position only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from spark_llm.engine.cache.radix import RadixTree
from spark_llm.engine.model.sampling import sample
from spark_llm.engine.request import Request, SamplingParams
from spark_llm.engine.scheduling.row import Row

ROOT = RadixTree(1).root

LOGITS = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread; on a busy machine two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(seed: int | None, position: int = 0, **params: float) -> Row:
    """A row that has answered ``position`` tokens."""
    settings = SamplingParams(max_tokens=position + 1, **params)  # type: ignore[arg-type]
    new = Row(Request(0, np.array([1], np.int32), settings, seed=seed), 0, ROOT)
    new.learn([0] * position)
    return new


def draws(logits: Tensor, count: int, **params: float) -> np.ndarray:
    """One draw for each of ``count`` seeds."""
    rows = [row(seed, **params) for seed in range(count)]
    return np.array(sample(logits.expand(count, -1), rows))


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Per degree of freedom, over cells that expect at least five draws."""
    cells = expected >= 5
    return float((((counts - expected) ** 2 / expected.clip(1e-9))[cells]).sum() / max(1, cells.sum() - 1))


@given(LOGITS)
def test_temperature_zero_is_argmax(logits: np.ndarray) -> None:
    assert sample(torch.from_numpy(logits)[None], [row(None)]) == [int(logits.argmax())]


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float, position: int) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5])
    count = 4000
    rows = [row(seed, position, temperature=temperature) for seed in range(count)]
    counts = np.bincount(sample(logits.expand(count, -1), rows), minlength=7)
    expected = probabilities(logits.numpy(), temperature) * count
    assert chi_square(counts, expected) < 3.0  # six degrees of freedom: beyond the 99.5th percentile
    assert chi_square(counts, np.roll(expected, 1)) > 30  # the check can fail


def test_draws_of_consecutive_positions_and_seeds_are_independent() -> None:
    logits = torch.zeros(4)
    first = draws(logits, 4000, temperature=1.0)
    second = np.array(sample(logits.expand(4000, -1), [row(s, 1, temperature=1.0) for s in range(4000)]))
    pairs = np.bincount(first * 4 + second, minlength=16)
    neighbours = np.bincount(first[:-1] * 4 + first[1:], minlength=16)
    assert chi_square(pairs, np.full(16, 250.0)) < 2.5
    assert chi_square(neighbours, np.full(16, 250.0)) < 2.5


@settings(deadline=None)
@given(LOGITS, st.integers(0, 12), st.floats(0.01, 1.0), st.floats(0.1, 5.0), st.integers(0, 2**63 - 1))
def test_draws_stay_within_top_k_and_top_p(
    logits: np.ndarray, top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    """A drawn token is among the k likeliest, and the tokens likelier than it weigh less than top_p."""
    one = row(seed, temperature=temperature, top_k=top_k, top_p=top_p)
    token = sample(torch.from_numpy(logits)[None], [one])[0]
    likelier = logits > logits[token]
    assert likelier.sum() < (top_k or len(logits))
    kept = np.sort(logits)[::-1][: top_k or len(logits)]
    weights = probabilities(kept, temperature)
    assert weights[kept > logits[token]].sum() <= top_p + 1e-6


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(logits, 600, temperature=1.0, top_p=0.7)) == {0, 1}
    assert set(draws(logits, 600, temperature=1.0, top_p=0.85)) == {0, 1, 2}
    assert set(draws(logits, 600, temperature=1.0, top_p=0.4)) == {0}
    assert set(draws(logits, 600, temperature=1.0, top_k=3)) == {0, 1, 2}
    assert set(draws(logits, 200, temperature=1.0, top_k=1)) == {0}


def test_top_k_and_top_p_keep_the_proportions_of_what_is_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    counts = np.bincount(draws(logits, 4000, temperature=1.0, top_k=2), minlength=4)
    assert chi_square(counts[:2], np.array([4, 3]) / 7 * 4000) < 7.9  # one degree of freedom


def test_a_draw_hangs_on_seed_and_position_only() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [row(seed, position, temperature=1.0) for seed, position in ((1, 0), (2, 5), (3, 9))]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(3)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_a_row_without_a_seed_gets_one_and_keeps_it() -> None:
    logits = torch.zeros(1, 100_000)
    one, other = row(None, temperature=1.0), row(None, temperature=1.0)
    token = sample(logits, [one])[0]
    assert one.request.seed is not None
    assert sample(logits, [one])[0] == token  # recomputed after preemption
    assert sample(logits, [other])[0] != token


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1, 2**64 - 1])
def test_any_seed_of_64_bits_is_taken(seed: int) -> None:
    assert 0 <= sample(torch.zeros(1, 9), [row(seed, temperature=1.0)])[0] < 9


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, -3.0, 4.999]])
    assert sample(logits, [row(0, temperature=temperature)]) == [1]


def test_a_huge_temperature_is_uniform() -> None:
    counts = np.bincount(draws(torch.tensor([9.0, 0.0, -9.0, 3.0]), 2000, temperature=1e30), minlength=4)
    assert chi_square(counts, np.full(4, 500.0)) < 4.3
