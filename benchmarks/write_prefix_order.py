"""Puts the runs in artifacts/ into docs/prefix-order.md: its figures are measured, not typed.

.venv/bin/python benchmarks/write_prefix_order.py
"""

from __future__ import annotations

import json

import cache_eviction
import order_quality
import prefix_order
import reorder_solver
from cpu_engine import ROOT
from write_performance import with_block

PAGE = ROOT / "docs" / "prefix-order.md"
REPORTS = {
    **{prefix_order.path_of(part).stem: prefix_order.report for part in prefix_order.MEASURE},
    "reorder_solver": reorder_solver.report,
    "cache_eviction": cache_eviction.report,
    "order_quality": order_quality.report,
}


def main() -> None:
    page = PAGE.read_text()
    for name, report in REPORTS.items():
        source = ROOT / "artifacts" / f"{name}.json"
        if source.exists():
            page = with_block(page, name, report(json.loads(source.read_text())))
            print(f"{name}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
