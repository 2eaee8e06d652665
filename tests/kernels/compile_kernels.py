"""Compiles the kernels as a GPU of compute capability 9.0 would run them, without one; prints a line of JSON for each.

    python compile_kernels.py

The launchers are called as the decoder calls them; where Triton would launch, the kernel is compiled with the very
types, constants, warps and stages. Needs TRITON_INTERPRET unset.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from spark_llm.kernels.activation import silu_and_mul
from spark_llm.kernels.candidates import candidate_logits
from spark_llm.kernels.matmul import matmul
from spark_llm.kernels.norm import add_rms_norm
from spark_llm.kernels.paged_attention import attend, merge_parts
from spark_llm.kernels.quantize import quantize_fp8
from spark_llm.kernels.rope import rope_and_store
from spark_llm.kernels.sampling import sample
from spark_llm.kernels.token_mask import mask_logits

TARGET = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Compiler:
    """Stands in for launches; what is compiled already is not compiled again."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.label = ""

    def launch(self, fn: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(fn.params):
            value = values[parameter.name]
            fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or fixed:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, Tensor) or (
                isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            ):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = repr((fn.__name__, signature, constants, attributes, options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(fn, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options)
        print(json.dumps({"kernel": fn.__name__, "case": self.label, **_measured(compiled)}), flush=True)


def _measured(compiled: Any) -> dict[str, int]:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "cp_async": ptx.count("cp.async"),
        "wide": len(re.findall(r"(?:ld|st)\.global\S*\.v[24]|cp\.async\.cg\S* +\[[^]]*\], +\[[^]]*\], +0x10", ptx)),
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
    }


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def ints(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def floats(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def attention(compiler: Compiler) -> None:
    shapes = [
        # D, page, dtype, tile, gathers
        (64, 1, torch.bfloat16, 16, False),
        (64, 16, torch.bfloat16, 128, True),
        (128, 16, torch.bfloat16, 16, False),
        (128, 1, torch.bfloat16, 64, False),
        (128, 1, torch.bfloat16, 128, True),
        (64, 1, torch.float32, 16, False),
    ]
    for dim, page, dtype, tile, gathers in shapes:
        compiler.label = f"D {dim}, page {page}, {str(dtype)[6:]}, tile {tile}{', gathers' * gathers}"
        q = empty(4, 32, dim, dtype=dtype)
        k, v = empty(64, 8, dim, dtype=dtype), empty(64, 8, dim, dtype=dtype)
        parts, lse = floats(2, 4, 32, dim), floats(2, 4, 32)
        attend(
            q, k, v, ints(2, 128), ints(32) if gathers else None, ints(3, 8), torch.empty_like(q), parts, lse,
            page_size=page, scale=dim**-0.5, tile=tile,
        )  # fmt: skip
        merge_parts(parts, lse, ints(4), q)


def fused(compiler: Compiler) -> None:
    fp8 = torch.float8_e4m3fn
    hidden, inner, dim = 4096, 14336, 128
    compiler.label = f"hidden {hidden}"
    x, residual, weight = empty(4, hidden), empty(4, hidden), empty(hidden)
    add_rms_norm(None, residual, weight, 1e-5, empty(4, hidden))
    add_rms_norm(x, residual, weight, 1e-5, empty(4, hidden))
    add_rms_norm(x, residual, weight, 1e-5, empty(4, hidden, dtype=fp8), floats(4))
    silu_and_mul(empty(4, 2 * inner), empty(4, inner))
    silu_and_mul(empty(4, 2 * inner), empty(4, inner, dtype=fp8), floats(4))
    quantize_fp8(x)
    for norm in (None, empty(dim)):
        rope_and_store(
            empty(4, 48 * dim), floats(64, dim), ints(4), ints(4), ints(2, 128), empty(64, 8, dim),
            empty(64, 8, dim), empty(4, 32, dim), page_size=1, q_norm=norm, k_norm=norm, eps=1e-6,
        )  # fmt: skip
    candidate_logits(x, empty(512, hidden), ints(4, 24))


def heads(compiler: Compiler) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compiler.label = f"vocabulary 128256, {str(dtype)[6:]}"
        seed = torch.zeros(4, dtype=torch.int64)
        sample(empty(4, 128256, dtype=dtype), floats(4), ints(4), floats(4), seed, ints(4), ints(4))
        mask_logits(empty(4, 128256, dtype=dtype), ints(2), ints(2, 4008))
    compiler.label = "bfloat16"
    matmul(empty(64, 4096), empty(1024, 4096), empty(1024))


if __name__ == "__main__":
    compiler = Compiler()
    JITFunction.run = lambda fn, *args, **kwargs: compiler.launch(fn, *args, **kwargs)
    attention(compiler)
    fused(compiler)
    heads(compiler)
