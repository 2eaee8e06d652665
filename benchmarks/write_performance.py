"""Puts the runs that ``make bench`` left in artifacts/ into docs/performance.md: its figures are measured, not typed.

.venv/bin/python benchmarks/write_performance.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import ai_functions
import constrained
import results
import scheduler_scale

ROOT = Path(__file__).resolve().parent.parent
REPORTS = {
    "ai_functions": ai_functions.report,
    "constrained": constrained.report,
    "scheduler_scale": scheduler_scale.report,
}
PAGE = ROOT / "docs" / "performance.md"


def with_block(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` as the code block between the marks of ``name``."""
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not mark.search(page):
        raise ValueError(f"docs/performance.md has no place for {name}")
    return mark.sub(lambda found: f"{found[1]}```text\n{text}\n```\n{found[2]}", page)


def main() -> None:
    page, artifacts = PAGE.read_text(), ROOT / "artifacts"
    for name in sorted(re.findall(r"<!-- (\w+) -->", page)):
        source = artifacts / f"{name}.json"
        if name == "end" or not source.exists():
            continue
        report = REPORTS.get(name, results.report)
        page = with_block(page, name, report(json.loads(source.read_text())))
        print(f"{name}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
