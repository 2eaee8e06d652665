"""What the compiler makes of the kernels for a Hopper GPU: tensor cores, wide loads, nothing spilled that counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = 227 << 10  # bytes that a block may have on compute capability 9.0
SPILLED = 16  # bytes a thread, beside loops
SPILLED_BY_ATTENTION = 160  # of its largest tile: so two programs fit a multiprocessor


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    assert {found["kernel"] for found in compiled} == {
        "_attend", "_merge", "_add_rms_norm", "_silu_and_mul", "_quantize", "_rope", "_candidate_logits", "_greatest",
        "_join", "_cut", "_draw", "_matmul", "_mask",
    }  # fmt: skip
    assert [found for found in compiled if found["shared"] > SHARED] == []


def test_large_tiles_use_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    large = [
        found
        for found in compiled
        if found["kernel"] == "_matmul" or (found["kernel"] == "_attend" and "tile 16" not in found["case"])
    ]
    assert len(large) == 4
    assert [found for found in large if not found["wgmma"]] == []


def test_registers_hold_what_loops_need(compiled: list[dict[str, Any]]) -> None:
    most = {"_attend": SPILLED_BY_ATTENTION}
    assert [found for found in compiled if found["local"] > most.get(found["kernel"], SPILLED)] == []


def test_what_memory_bounds_loads_many_bytes_at_once(compiled: list[dict[str, Any]]) -> None:
    assert [found for found in compiled if found["kernel"] != "_join" and not found["wide"]] == []
