"""Norm, rotation with the K/V write, activation, FP8 and the restricted head, each against its definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark_llm.engine.model.decoder import rms_norm
from spark_llm.engine.model.rope import interleave, rotate
from spark_llm.kernels.activation import silu_and_mul, silu_and_mul_reference
from spark_llm.kernels.candidates import candidate_logits, candidate_logits_reference
from spark_llm.kernels.norm import add_rms_norm, add_rms_norm_reference
from spark_llm.kernels.quantize import quantize_channels_reference, quantize_fp8
from spark_llm.kernels.rope import rope_and_store, rope_reference
from spark_llm.kernels.sampling import sample

EPS = 1e-5
# one unit in the last place, where float32 sums of another order round to the neighbour
ULP = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = st.sampled_from(list(ULP))
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def _rounds_as_hardware_does() -> Iterator[None]:
    """The interpreter cuts bfloat16 off, and loses the carry of e4m3; torch rounds both to nearest, as a GPU does."""
    narrow = {"bf16": (torch.bfloat16, torch.int16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8)}
    plain = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or str(target) not in narrow:
            return plain(values, source, target, mode)
        dtype, bits = narrow[str(target)]
        rounded = torch.from_numpy(np.array(values, np.float32)).to(dtype).view(bits).numpy()
        return rounded.view(f"u{rounded.itemsize}")

    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter, "_convert_float", convert)
    yield
    patch.undo()


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (scale * values).to(dtype).to(device)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    rounding = ULP[found.dtype]
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=rounding, atol=rounding / 4)


@FEW
@given(tokens=st.integers(0, 5), hidden=st.integers(1, 600), dtype=DTYPES, adds=st.booleans())
def test_norm_is_the_definition(tokens: int, hidden: int, dtype: torch.dtype, adds: bool, device: str) -> None:
    x = draw(tokens, hidden, dtype=dtype, device=device, seed=1) if adds else None
    residual = draw(tokens, hidden, dtype=dtype, device=device, scale=3)
    weight = draw(hidden, dtype=dtype, device=device)
    expected_residual, expected = add_rms_norm_reference(x, residual, weight, EPS)
    out = torch.full_like(residual, math.nan)
    add_rms_norm(x, residual, weight, EPS, out)
    assert torch.equal(residual, expected_residual), "a sum of two numbers has one rounding"
    assert_close(out, expected)
    assert_close(expected.cpu(), rms_norm(expected_residual.cpu(), weight.cpu(), EPS))


def test_a_row_of_zeros_has_a_norm(device: str) -> None:
    residual = torch.zeros(2, 8, device=device)
    out = torch.full_like(residual, math.nan)
    add_rms_norm(None, residual, torch.ones(8, device=device), EPS, out)
    assert torch.equal(out, residual)


@FEW
@given(tokens=st.integers(0, 4), inner=st.sampled_from([1, 7, 64, 1024, 1500]), dtype=DTYPES)
def test_activation_is_the_definition(tokens: int, inner: int, dtype: torch.dtype, device: str) -> None:
    gate_up = draw(tokens, 2 * inner, dtype=dtype, device=device, scale=4)
    out = gate_up.new_full((tokens, inner), math.nan)
    silu_and_mul(gate_up, out)
    assert_close(out, silu_and_mul_reference(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gates_far_from_zero_are_finite(device: str) -> None:
    gate_up = torch.tensor([[-3e38, -100.0, 100.0, 3e38, 1.0, 2.0, 3.0, 1.0]], device=device)
    out = torch.full((1, 4), math.nan, device=device)
    silu_and_mul(gate_up, out)
    assert_close(out, torch.tensor([[0.0, 0.0, 300.0, 3e38]]))


class Steps:
    """Tokens of some lanes in a pool of NaN: the last lane is scratch, on the last page."""

    def __init__(
        self, heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, device: str, tokens: int
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.page_size = heads, kv_heads, dim, page_size
        lanes, width = 3, 50 // page_size + 1
        order = torch.Generator().manual_seed(dim)
        self.table = torch.randperm(lanes * width, generator=order).view(lanes, width).int()
        self.table = torch.cat((self.table, torch.full((1, width), lanes * width, dtype=torch.int32)))
        place = torch.randperm(lanes * 50, generator=order)[:tokens]
        self.lanes, self.positions = (place // 50).int(), (place % 50).int()
        self.lanes[tokens // 2 :: 5] = lanes
        self.qkv = draw(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, device=device)
        shape = (lanes * width + 1) * page_size, kv_heads, dim
        self.k, self.v = (torch.full(shape, math.nan, dtype=dtype, device=device) for _ in range(2))
        angles = torch.outer(torch.arange(50.0), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(device)
        self.table, self.lanes, self.positions = (t.to(device) for t in (self.table, self.lanes, self.positions))

    def run(self, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        q = torch.full_like(self.qkv[:, : self.heads * self.dim], math.nan).view(len(self.qkv), self.heads, self.dim)
        rope_and_store(
            self.qkv, self.cos_sin, self.positions, self.lanes, self.table, self.k, self.v, q,
            page_size=self.page_size, q_norm=q_norm, k_norm=k_norm, eps=EPS,
        )  # fmt: skip
        return q

    def heads_of_each(self) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv.view(len(self.qkv), self.heads + 2 * self.kv_heads, self.dim).split(
            (self.heads, self.kv_heads, self.kv_heads), 1
        )
        return parts[0], parts[1], parts[2]

    def slots(self) -> Tensor:
        lanes, positions = self.lanes.long(), self.positions.long()
        return self.table[lanes, positions // self.page_size] * self.page_size + positions % self.page_size


@FEW
@given(
    heads=st.sampled_from([(1, 1), (6, 2), (20, 20), (32, 8)]), dim=st.sampled_from([2, 64, 80, 96, 128, 256]),
    page_size=st.sampled_from([1, 4, 16]), dtype=DTYPES, normed=st.booleans(), tokens=st.integers(0, 6),
)  # fmt: skip
def test_rotation_and_write_are_the_definition(
    heads: tuple[int, int], dim: int, page_size: int, dtype: torch.dtype, normed: bool, tokens: int, device: str
) -> None:
    step = Steps(*heads, dim, page_size, dtype, device, tokens)
    norms = [draw(dim, dtype=dtype, device=device, seed=i) if normed else None for i in range(2)]
    found = step.run(*norms)
    q, k, v = step.heads_of_each()
    assert_close(found, rope_reference(q, step.cos_sin, step.positions, norms[0], EPS))
    slots = step.slots()
    real = step.lanes < 3  # several padding tokens may meet in a scratch slot
    assert_close(step.k[slots][real], rope_reference(k, step.cos_sin, step.positions, norms[1], EPS)[real])
    assert torch.equal(step.v[slots][real], v[real])
    untouched = torch.ones(len(step.k), dtype=torch.bool, device=device)
    untouched[slots.long()] = False
    assert step.k[untouched].isnan().all()
    assert step.v[untouched].isnan().all()
    assert not step.k[slots].isnan().any(), "padding too writes numbers, to the scratch page"


def test_scores_are_those_of_the_cpu_engine(device: str) -> None:
    """It holds pairs side by side; a score is the same in either order."""
    step = Steps(4, 2, 16, 1, torch.float32, device, 9)
    found = step.run(None, None).cpu()
    q, k, _ = (part.cpu() for part in step.heads_of_each())
    angles = torch.complex(*step.cos_sin.cpu()[step.positions.cpu().long()].chunk(2, -1))[:, None]
    cpu_q, cpu_k = (
        rotate(interleave(x.permute(1, 2, 0).reshape(-1, 9), 16).view(-1, 16, 9).permute(2, 0, 1).contiguous(), angles)
        for x in (q, k)
    )
    keys = step.k.cpu()[step.slots().cpu()]
    scores = torch.einsum("thd,shd->ths", found[:, ::2], keys)
    torch.testing.assert_close(scores, torch.einsum("thd,shd->ths", cpu_q[:, ::2], cpu_k), rtol=0, atol=2e-5)


@FEW
@given(tokens=st.integers(0, 4), width=st.integers(1, 700), dtype=DTYPES, power=st.integers(-12, 4))
def test_fp8_has_the_precision_of_three_bits(
    tokens: int, width: int, dtype: torch.dtype, power: int, device: str
) -> None:
    x = draw(tokens, width, dtype=dtype, device=device, scale=2.0**power)
    x8, scale = quantize_fp8(x)
    assert x8.dtype is torch.float8_e4m3fn
    back = x8.float() * scale[:, None]
    most = x.float().abs().amax(-1, keepdim=True)
    error = (back - x.float()).abs()
    assert (error <= x.float().abs() * 2.0**-4 * 1.001 + most * 2.0**-10 / 448 * 1.001 + 1e-14).all()
    torch.testing.assert_close(back.abs().amax(-1, keepdim=True), most, rtol=1e-6, atol=1e-14)
    expected8, expected_scale = quantize_channels_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(x8.view(torch.uint8), expected8.view(torch.uint8))


def test_zeros_in_fp8_are_zeros(device: str) -> None:
    x8, scale = quantize_fp8(torch.zeros(3, 40, device=device))
    assert (x8.float() * scale[:, None] == 0).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [48, 700])
def test_fused_fp8_is_that_of_two_steps(width: int, dtype: torch.dtype, device: str) -> None:
    def check(out: Tensor, out8: Tensor, scale: Tensor) -> None:
        expected8, expected_scale = quantize_fp8(out)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(out8.view(torch.uint8), expected8.view(torch.uint8))

    def empty8() -> tuple[Tensor, Tensor]:
        return torch.empty(3, width, dtype=torch.float8_e4m3fn, device=device), torch.empty(3, device=device)

    x, residual = (draw(3, width, dtype=dtype, device=device, seed=i) for i in range(2))
    weight, again = draw(width, dtype=dtype, device=device), residual.clone()
    out = torch.empty_like(residual)
    out8, scale = empty8()
    add_rms_norm(x, residual, weight, EPS, out)
    add_rms_norm(x, again, weight, EPS, out8, scale)
    assert torch.equal(residual, again)
    check(out, out8, scale)

    gate_up = draw(3, 2 * width, dtype=dtype, device=device)
    out8, scale = empty8()
    silu_and_mul(gate_up, out)
    silu_and_mul(gate_up, out8, scale)
    check(out, out8, scale)


@FEW
@given(rows=st.integers(0, 4), width=st.integers(1, 600), count=st.integers(0, 19), dtype=DTYPES)
def test_a_restricted_head_is_the_head(rows: int, width: int, count: int, dtype: torch.dtype, device: str) -> None:
    hidden, head = (draw(n, width, dtype=dtype, device=device) for n in (rows, 50))
    generator = torch.Generator().manual_seed(width)
    candidates = torch.randint(-1, 50, (rows, count), dtype=torch.int32, generator=generator).to(device)
    found = candidate_logits(hidden, head, candidates)
    expected = candidate_logits_reference(hidden, head, candidates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * width**0.5)
    full = hidden.float() @ head.float().t()
    assert (found.isinf() == (candidates < 0)).all()
    picked = full.gather(1, candidates.clamp(min=0).long()).masked_fill(candidates < 0, -math.inf)
    torch.testing.assert_close(found, picked, rtol=1e-4, atol=1e-4 * width**0.5)


def test_a_label_is_chosen_among_the_candidates(device: str) -> None:
    """Padding is never chosen; of equal candidates the first."""
    hidden = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], device=device)
    head = torch.tensor([[9.0, 9.0], [2.0, 1.0], [3.0, 2.0], [1.0, 3.0]], device=device)
    candidates = torch.tensor([[1, 2, 3, -1], [3, -1, 2, 1], [-1, 3, 1, -1]], dtype=torch.int32, device=device)
    chosen = torch.empty(3, dtype=torch.int32, device=device)
    sample(candidate_logits(hidden, head, candidates), None, None, None, None, None, chosen)
    assert candidates.gather(1, chosen.long()[:, None]).flatten().tolist() == [2, 1, 3]
