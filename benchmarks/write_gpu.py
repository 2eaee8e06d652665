"""Puts the GPU runs in artifacts/ into docs/gpu.md: its tables are measured, not typed.

.venv/bin/python benchmarks/write_gpu.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_engine
from write_performance import with_block

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"


def main() -> None:
    page = PAGE.read_text()
    for name, report in (("gpu_engine", gpu_engine.report), ("gpu_attention", attention_report)):
        source = ROOT / "artifacts" / f"{name}.json"
        if source.exists():
            page = with_block(page, name, report(json.loads(source.read_text())))
            print(f"{name}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page)


def attention_report(results: list[dict[str, Any]]) -> str:
    """A line a shape: heads / kv heads x head size."""
    return "\n".join(map(_line, results))


def _line(r: dict[str, Any]) -> str:
    if r["kind"] == "extend":
        shape = f"{r['rows']:4} x {r['count']:5} new over {r['start']:5}"
        return (
            f"extend {r['heads']:12} {shape}  {r['tflops']:5.0f} TFLOP/s  {r['tflops'] / r['sdpa']:5.0%} of torch's "
            f"{r['sdpa']:.0f}"
        )
    if r["kind"] == "decode":
        shape = f"{r['rows']:4} rows of {r['context']:6} keys   "
        return f"decode {r['heads']:12} {shape}  {r['tbs']:5.2f} TB/s     {r['of_copy']:5.0%} of a copy"
    ratios = f"{r['plain'] / r['once']:5.1f}x plain      {r['distinct'] / r['once']:5.1f}x distinct pages"
    return f"shared {r['heads']:12}   64 rows below 2,048      {ratios}"


if __name__ == "__main__":
    main()
