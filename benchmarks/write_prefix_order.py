"""Puts the runs of prefix_order.py in artifacts/ into docs/prefix-order.md: its figures are measured, not typed.

.venv/bin/python benchmarks/write_prefix_order.py
"""

from __future__ import annotations

import json

from cpu_engine import ROOT
from prefix_order import MEASURE, path_of, report
from write_performance import with_block

PAGE = ROOT / "docs" / "prefix-order.md"


def main() -> None:
    page = PAGE.read_text()
    for part in MEASURE:
        source = path_of(part)
        if source.exists():
            page = with_block(page, source.stem, report(json.loads(source.read_text())))
            print(f"{part}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
