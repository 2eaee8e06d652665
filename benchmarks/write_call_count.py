"""Puts the runs in artifacts/ into docs/calls-made.md: its figures are measured, not typed.

.venv/bin/python benchmarks/write_call_count.py
"""

from __future__ import annotations

import json

import call_count
from cpu_engine import ROOT
from write_performance import with_block

PAGE = ROOT / "docs" / "calls-made.md"


def main() -> None:
    page = PAGE.read_text()
    for part in call_count.REPORT:
        source = call_count.path_of(part)
        if source.exists():
            page = with_block(page, source.stem, call_count.report(json.loads(source.read_text())))
            print(f"{source.stem}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
