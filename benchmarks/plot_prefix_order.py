"""Draws the paper's 16 queries from what prefix_order.py measured, and keeps the numbers beside the picture.

.venv/bin/python benchmarks/prefix_order.py --part queries && .venv/bin/python benchmarks/plot_prefix_order.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plot_demo import NAIVE, OURS, ROOT, SHARED
from prefix_order import path_of
from prefix_order_queries import NONE, STORED, from_record
from prefix_order_queries import OURS as OUR_WAY

COLOURS = {NONE: NAIVE, STORED: SHARED, OUR_WAY: OURS}


def draw(record: Mapping[str, Any], out: Path) -> None:
    """Left: seconds of a query's calls. Right: tokens that were computed. One bar for each way."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "spark-llm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    cases = from_record(record)
    names = list(dict.fromkeys(case.query for case in cases))
    by_way = {(case.query, case.way): case for case in cases}
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 0.42 * len(names) + 1.2), sharey=True, layout="constrained"
    )
    for number, way in enumerate(COLOURS):
        found = [by_way[name, way] for name in names]
        places = [place + 0.27 * (number - 1) for place in range(len(names))]
        left.barh(places, [case.call_seconds for case in found], 0.26, color=COLOURS[way], label=way)
        right.barh(places, [case.computed_tokens for case in found], 0.26, color=COLOURS[way], label=way)
        if way == OUR_WAY:
            for place, name, case in zip(places, names, found, strict=True):
                slow = by_way[name, NONE]
                left.text(
                    case.call_seconds, place, f" {slow.call_seconds / max(case.call_seconds, 1e-9):.1f}x", va="center"
                )
                right.text(case.computed_tokens, place, f" {case.hits.rate:.0%} found", va="center")
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_title("time of the calls (x: no cache against ours)")
    left.set_xlabel("seconds")
    right.set_title("tokens computed")
    right.set_xlabel("tokens")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=path_of("queries"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "prefix_order.svg")
    arguments = parser.parse_args()
    if not arguments.json.is_file():
        raise SystemExit(f"{arguments.json} is missing: run `prefix_order.py --part queries` first.")
    text = arguments.json.read_text("utf-8")
    draw(json.loads(text), arguments.out)
    arguments.out.with_suffix(".json").write_text(text, "utf-8")
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
