"""Puts the fairness runs in artifacts/ into docs/fair-queries.md: its tables are measured, not typed.

.venv/bin/python benchmarks/write_fairness.py
"""

from __future__ import annotations

import json
import re

import fairness
import fairness_sim
import fairness_spark
from cpu_engine import ROOT
from write_performance import with_block

PAGE = ROOT / "docs" / "fair-queries.md"
REPORTS = {
    **{fairness.path_of(part, "sim").stem: fairness.REPORT[part] for part in fairness.PARTS},
    fairness.path_of("papers", "real").stem: fairness.REPORT["papers"],
    fairness_sim.OUT.stem: fairness_sim.report,
    fairness_spark.OUT.stem: fairness_spark.report,
}


def main() -> None:
    page = PAGE.read_text("utf-8")
    for name in re.findall(r"<!-- (fairness_\w+) -->", page):
        source = ROOT / "artifacts" / f"{name}.json"
        if name in REPORTS and source.exists():
            page = with_block(page, name, REPORTS[name](json.loads(source.read_text("utf-8"))))
            print(f"{name}: from {source.relative_to(ROOT)}")
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
