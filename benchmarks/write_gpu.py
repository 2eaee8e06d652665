"""Puts the GPU runs in artifacts/ into docs/gpu.md: its tables are measured, not typed.

.venv/bin/python benchmarks/write_gpu.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_engine
import gpu_exact
import gpu_fp8
import gpu_tensor_parallel
from write_performance import with_block

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"


def main() -> None:
    page = PAGE.read_text()
    for name, report in BLOCKS.items():
        source = ROOT / "artifacts" / f"{name.partition('.')[0]}.json"
        if source.exists() and f"<!-- {name} -->" in page:
            page = with_block(page, name, report(json.loads(source.read_text())))
            print(f"{name}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page)


def attention_report(results: list[dict[str, Any]]) -> str:
    """A line a shape: heads / kv heads x head size."""
    return "\n".join(_line(result) for result in results if result["kind"] != "rule")


def rule_report(results: list[dict[str, Any]]) -> str:
    """One decode step each way, and what the choice costs over the faster of them."""
    lines = [f"{'':12}{'rows':>6}{'prefix':>8}{'once us':>9}{'plain us':>10}  chosen"]
    for r in results:
        if r["kind"] == "rule":
            loss = f"  {r['loss']:.0%} over the faster" if r["loss"] > 0.005 else ""
            times = f"{r['once'] * 1e6:9.1f}{r['plain'] * 1e6:10.1f}"
            lines.append(f"{r['heads']:12}{r['rows']:6}{r['prefix']:8}{times}  {r['chosen']}{loss}")
    return "\n".join(lines)


def spark_report(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line a run of each model."""
    lines = [
        f"{'model':10}{'run':8}{'rows':>7}{'seconds':>9}{'rows/s':>8}{'prompt tokens/s':>17}{'cached':>8}{'busy':>6}"
    ]
    for model, runs in results.items():
        lines += [
            f"{model:10}{r['run']:8}{r['rows']:7}{r['seconds']:9.2f}{r['rows_per_second']:8.0f}"
            f"{r['prompt_tokens_per_second']:17,.0f}{r['cached']:8.1%}{r['busy']:6.0%}"
            for r in runs
        ]
    return "\n".join(lines)


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


BLOCKS: dict[str, Callable[[Any], str]] = {  # the file of each is named before the dot
    "gpu_engine": gpu_engine.report,
    "gpu_attention": attention_report,
    "gpu_attention.rule": rule_report,
    "gpu_tensor_parallel": gpu_tensor_parallel.report,
    "gpu_exact": gpu_exact.report,
    "gpu_fp8": gpu_fp8.report,
    "gpu_spark": spark_report,
}


if __name__ == "__main__":
    main()
