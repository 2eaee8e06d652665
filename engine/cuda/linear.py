"""Matrix products of the GPU decoder: cuBLAS in the model's dtype, FP8 (e4m3), or bits that no other row changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear(Protocol):
    """y = x W^T + b. x: [tokens, in].

    takes_fp8: x may be in e4m3 with ``scale``, float32 [tokens], as kernels/quantize.py makes them: a kernel that
    computes x then spares a pass over it.
    """

    takes_fp8: bool

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor: ...


class DenseLinear:
    """torch's own product: cuBLAS, which no kernel of ours beats."""

    __slots__ = ("bias", "weight")
    takes_fp8 = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Fp8Linear:
    """W8A8 in e4m3: weights with a scale per output channel, activations with one per token, found as they come."""

    __slots__ = ("bias", "dtype", "scale", "weight")
    takes_fp8 = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from spark_llm.kernels.quantize import quantize_channels_reference

        quantized, scale = quantize_channels_reference(weight)
        self.weight = quantized.t()  # scaled_mm takes its second operand column-major
        self.scale = scale.view(1, -1)
        self.bias = bias
        self.dtype = weight.dtype

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        from spark_llm.kernels.quantize import quantize_fp8

        if scale is None:
            x, scale = quantize_fp8(x)
        product: Tensor = torch._scaled_mm(
            x, self.weight, scale_a=scale.view(-1, 1), scale_b=self.scale, bias=self.bias, out_dtype=self.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        return product


class InvariantLinear:
    """Each row's result is the same bits whatever the other rows are; see kernels/matmul.py."""

    __slots__ = ("bias", "weight")
    takes_fp8 = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.contiguous()
        self.bias = bias

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        from spark_llm.kernels.matmul import matmul

        return matmul(x, self.weight, self.bias)


MakeLinear = Callable[[Tensor, Tensor | None], Linear]
