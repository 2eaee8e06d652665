"""Masked logits by the kernel and by the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_llm.kernels.token_mask import mask_logits, mask_logits_reference


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    vocabulary=st.sampled_from([1, 31, 32, 33, 120, 4096, 4097]),
    chosen=st.lists(st.integers(0, 4), max_size=4, unique=True),
    spare=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_what_a_mask_closes_cannot_be_drawn(
    vocabulary: int, chosen: list[int], spare: int, dtype: torch.dtype, seed: int, device: str
) -> None:
    """Only those rows, only those tokens; masks may be wider than the vocabulary."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocabulary, generator=draw).to(dtype)
    words = -(-vocabulary // 32) + spare
    masks = torch.randint(-(2**31), 2**31, (len(chosen), words), generator=draw).to(torch.int32)
    rows = torch.tensor(chosen, dtype=torch.int32)
    found, expected = logits.to(device), logits.clone()
    mask_logits(found, rows.to(device), masks.to(device))
    mask_logits_reference(expected, rows, masks)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("bits", [0, -1])
def test_all_or_nothing(bits: int, device: str) -> None:
    logits = torch.randn(2, 100, device=device)
    masked = logits.clone()
    mask_logits(
        masked, torch.tensor([1], dtype=torch.int32, device=device),
        torch.full((1, 4), bits, dtype=torch.int32, device=device),
    )  # fmt: skip
    assert torch.equal(masked[0], logits[0])
    assert torch.equal(masked[1], logits[1] if bits else torch.full_like(logits[1], -torch.inf))
