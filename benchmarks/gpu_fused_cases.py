"""What gpu_fused.py measures: each fused kernel with its check, its bytes, and the torch operations it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spark_llm.kernels.activation import silu_and_mul, silu_and_mul_reference
from spark_llm.kernels.candidates import candidate_logits, candidate_logits_reference
from spark_llm.kernels.norm import add_rms_norm, add_rms_norm_reference
from spark_llm.kernels.quantize import quantize_channels_reference, quantize_fp8
from spark_llm.kernels.rope import rope_and_store, rope_reference
from spark_llm.kernels.sampling import sample
from spark_llm.kernels.sampling_reference import sample_reference

EPS = 1e-5
VOCABULARY = 128_256
BEYOND_CACHE = 160 << 20  # bytes that calls go round before one comes again
Call = Callable[[], object]


@dataclass
class Case:
    """bytes: what one call must move. ours, theirs: of a set of buffers, the call to time; check: raises if wrong."""

    name: str
    shape: str
    bytes: float
    ours: Callable[[int], Call]
    theirs: Callable[[int], Call] | None
    check: Callable[[], None]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def copies(size: int) -> int:
    """Sets of buffers of ``size`` bytes that are larger than the L2 cache together."""
    return max(1, min(32, -(-BEYOND_CACHE // size)))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=1.6e-2, atol=4e-3)


def equal8(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """FP8: values that lie between two may fall to either, where what was quantised differs by a rounding."""
    torch.testing.assert_close(found[1], expected[1], rtol=1.6e-2, atol=0)
    values = [(x.float() * scale[:, None]) for x, scale in (found, expected)]
    torch.testing.assert_close(*values, rtol=0.15, atol=float(expected[1].max()) / 64)


def empty8(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(tokens, device="cuda")


def torch_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def norm_cases(tokens: int, hidden: int) -> list[Case]:
    weight = normal(hidden)
    out, (out8, scale) = normal(tokens, hidden), empty8(tokens, hidden)
    sets = [(normal(tokens, hidden), normal(tokens, hidden)) for _ in range(copies(tokens * hidden * 4))]

    def theirs(i: int) -> Call:
        x, residual = sets[i]
        return lambda: F.rms_norm(residual.add_(x), (hidden,), weight, EPS)

    def theirs8(i: int) -> Call:
        x, residual = sets[i]
        return lambda: torch_fp8(F.rms_norm(residual.add_(x), (hidden,), weight, EPS))

    def check() -> None:
        x, residual = sets[0]
        first, second = residual.clone(), residual.clone()
        expected_residual, expected = add_rms_norm_reference(x, residual, weight, EPS)
        add_rms_norm(x, first, weight, EPS, out)
        assert torch.equal(first, expected_residual)
        close(out, expected)
        add_rms_norm(x, second, weight, EPS, out8, scale)
        equal8((out8, scale), quantize_channels_reference(out))

    shape, elements = f"{tokens} x {hidden}", tokens * hidden
    plain = lambda i: lambda: add_rms_norm(*sets[i], weight, EPS, out)  # noqa: E731
    fused8 = lambda i: lambda: add_rms_norm(*sets[i], weight, EPS, out8, scale)  # noqa: E731
    return [
        Case("add_rms_norm", shape, 8 * elements, plain, theirs, check),
        Case("add_rms_norm fp8", shape, 7 * elements, fused8, theirs8, check),
    ]


def activation_cases(tokens: int, inner: int) -> list[Case]:
    out, (out8, scale) = normal(tokens, inner), empty8(tokens, inner)
    sets = [normal(tokens, 2 * inner) for _ in range(copies(tokens * inner * 4))]

    def multiplied(gate_up: Tensor) -> Tensor:
        return F.silu(gate_up[:, :inner]) * gate_up[:, inner:]

    def check() -> None:
        silu_and_mul(sets[0], out)
        close(out, silu_and_mul_reference(sets[0]))
        silu_and_mul(sets[0], out8, scale)
        equal8((out8, scale), quantize_channels_reference(out))
        equal8(quantize_fp8(out), quantize_channels_reference(out))

    shape, elements = f"{tokens} x {inner}", tokens * inner
    plain = lambda i: lambda: silu_and_mul(sets[i], out)  # noqa: E731
    fused8 = lambda i: lambda: silu_and_mul(sets[i], out8, scale)  # noqa: E731
    return [
        Case("silu_and_mul", shape, 6 * elements, plain, lambda i: lambda: multiplied(sets[i]), check),
        Case("silu_and_mul fp8", shape, 5 * elements, fused8, lambda i: lambda: torch_fp8(multiplied(sets[i])), check),
        Case(
            "quantize_fp8", f"{tokens} x {2 * inner}", 6 * elements, lambda i: lambda: quantize_fp8(sets[i]),
            lambda i: lambda: torch_fp8(sets[i]), check,
        ),
    ]  # fmt: skip


def rope_case(tokens: int, heads: int, kv_heads: int, dim: int, page_size: int, normed: bool) -> Case:
    """Rows of 64 new tokens each, at random positions, in random pages."""
    context, rows = 2048, max(1, tokens // 64)
    pages = rows * context // page_size
    table = torch.randperm(pages, device="cuda").view(rows, -1).int()
    lanes = torch.arange(tokens, device="cuda", dtype=torch.int32) // 64
    start = torch.randint(0, context - 64, (rows,), device="cuda")
    positions = (start[lanes.long()] + torch.arange(tokens, device="cuda") % 64).int()
    angles = torch.outer(torch.arange(context), 5e5 ** -(torch.arange(0, dim, 2) / dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).cuda()
    k_pool, v_pool = (torch.zeros(pages * page_size, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
    width = (heads + 2 * kv_heads) * dim
    sets = [normal(tokens, width) for _ in range(copies(tokens * width * 2))]
    q = normal(tokens, heads, dim)
    norms = (normal(dim), normal(dim)) if normed else (None, None)
    slots = (table[lanes.long(), positions.long() // page_size] * page_size + positions % page_size).long()

    def run(qkv: Tensor) -> None:
        rope_and_store(
            qkv, cos_sin, positions, lanes, table, k_pool, v_pool, q, page_size=page_size, q_norm=norms[0],
            k_norm=norms[1], eps=EPS,
        )  # fmt: skip

    def theirs(i: int) -> Call:
        cos, sin = (part.repeat(1, 2)[:, None].bfloat16() for part in cos_sin[positions.long()].chunk(2, -1))

        def rotate(x: Tensor, norm: Tensor | None) -> Tensor:
            x = x if norm is None else F.rms_norm(x, (dim,), norm, EPS)
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        def call() -> None:
            own_q, k, v = sets[i].view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
            rotate(own_q, norms[0])
            k_pool.index_copy_(0, slots, rotate(k, norms[1]))
            v_pool.index_copy_(0, slots, v)

        return call

    def check() -> None:
        run(sets[0])
        own_q, k, v = sets[0].view(tokens, -1, dim).split((heads, kv_heads, kv_heads), 1)
        close(q, rope_reference(own_q, cos_sin, positions, norms[0], EPS))
        close(k_pool[slots], rope_reference(k, cos_sin, positions, norms[1], EPS))
        assert torch.equal(v_pool[slots], v)

    name = "rope_and_store" + (" + norms" if normed else "")
    shape = f"{tokens} x {heads}/{kv_heads} x {dim}, pages of {page_size}"
    return Case(name, shape, 4 * tokens * width, lambda i: lambda: run(sets[i]), theirs, check)


def torch_draw(probabilities: Tensor) -> Tensor:
    """As multinomial() does it."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)


def torch_top_p(logits: Tensor, p: float) -> Tensor:
    """What torch needs to draw from the smallest set that reaches p."""
    scaled, ids = logits.float().sort(-1, descending=True)
    share = scaled.softmax(-1)
    kept = share.masked_fill(share.cumsum(-1) - share >= p, 0)
    return ids.gather(1, torch_draw(kept))


def sampling_cases(rows: int) -> list[Case]:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    sets = [3 * normal(rows, VOCABULARY) for _ in range(copies(rows * VOCABULARY * 2))]
    out = torch.empty(rows, dtype=torch.int32, device="cuda")
    position, seed = column(3, torch.int32), torch.arange(rows, device="cuda")

    def case(name: str, heat: float | None, k: int, p: float, theirs: Callable[[Tensor], object] | None) -> Case:
        parameters = column(heat or 0, torch.float32), column(k, torch.int32), column(p, torch.float32), seed, position
        given = (None, None, None, None, None) if heat is None else parameters

        def check() -> None:
            sample(sets[0], *given, out)
            few = [parameter[:4] for parameter in parameters]
            expected = sample_reference(sets[0][:4], *few)
            agree = (out[:4].cpu() == expected).sum()
            assert agree >= min(rows, 4) - (heat is not None), (name, out[:4], expected)

        torch_side = None if theirs is None else lambda i: lambda: theirs(sets[i])
        ours = lambda i: lambda: sample(sets[i], *given, out)  # noqa: E731
        return Case(name, f"{rows} x {VOCABULARY}", 2.0 * rows * VOCABULARY, ours, torch_side, check)

    few = rows < 4096  # torch's sort of all rows needs more memory than there is
    return [
        case("sample greedy", None, 0, 1.0, lambda logits: logits.argmax(-1)),
        case("sample heat 1", 1.0, 0, 1.0, lambda logits: torch_draw(logits.float().softmax(-1))),
        case("sample top-k 50", 1.0, 50, 1.0, lambda x: torch_draw(x.topk(50)[0].float().softmax(-1))),
        case("sample top-p 0.9", 1.0, 0, 0.9, (lambda logits: torch_top_p(logits, 0.9)) if few else None),
    ]


def candidate_case(rows: int, hidden: int, head: Tensor, count: int = 16) -> Case:
    states = normal(rows, hidden)
    labels = torch.randint(0, len(head), (8, count), device="cuda", dtype=torch.int32)
    candidates = labels[torch.arange(rows, device="cuda") % 8].contiguous()

    def check() -> None:
        found = candidate_logits(states[:64], head, candidates[:64])
        expected = candidate_logits_reference(states[:64], head, candidates[:64])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)

    return Case(
        "candidate_logits", f"{rows} x {hidden}, {count} of 8 sets", 2.0 * rows * hidden * (count + 1),
        lambda i: lambda: candidate_logits(states, head, candidates), lambda i: lambda: F.linear(states, head), check,
    )  # fmt: skip
