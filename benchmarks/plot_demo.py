"""Draws the picture of the README from the numbers that `make demo` measured, and keeps the numbers beside it.

make demo && .venv/bin/python benchmarks/plot_demo.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS, NAIVE, SHARED = "#2f6fb0", "#b9bec5", "#2f8f6b"


def draw(results: dict[str, Any], out: Path) -> None:
    """Left: milliseconds a row, ours and the naive sample's, on a log scale. Right: tokens reused and computed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "spark-llm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    queries = results["queries"]
    names = [query["title"] for query in queries.values()]
    ours = [1000 * query["ours"]["seconds_per_row"] for query in queries.values()]
    naive = [1000 * query["naive"]["seconds_per_row"] for query in queries.values()]
    places = list(range(len(names)))

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    left.barh([p - 0.2 for p in places], ours, 0.38, color=OURS, label="spark-llm, all rows")
    left.barh([p + 0.2 for p in places], naive, 0.38, color=NAIVE, label="a row at a time, 12 sampled")
    for place, fast, slow in zip(places, ours, naive, strict=True):
        left.text(fast, place - 0.2, f" {fast:.0f} ms", va="center")
        left.text(slow, place + 0.2, f" {slow:.0f} ms ({slow / fast:.1f}x)", va="center")
    left.set_xlim(0, max(naive) * 1.4)
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_title("time a row")
    left.set_xlabel("milliseconds")
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)

    for place, query in zip(places, queries.values(), strict=True):
        prompt, cached = query["ours"]["prompt_tokens"], query["ours"]["cached_tokens"]
        right.barh(place, cached, 0.6, color=SHARED, label="reused" if place == 0 else None)
        right.barh(place, prompt - cached, 0.6, left=cached, color=OURS, label="computed" if place == 0 else None)
        right.text(prompt, place, f" {cached / prompt:.0%} reused", va="center")
    right.set_xlim(0, max(query["ours"]["prompt_tokens"] for query in queries.values()) * 1.35)
    right.set_title("prompt tokens")
    right.set_xlabel("tokens")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "demo.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "demo.svg")
    arguments = parser.parse_args()
    if not arguments.json.is_file():
        raise SystemExit(f"{arguments.json} is missing: run `make demo` first.")
    text = arguments.json.read_text("utf-8")
    draw(json.loads(text), arguments.out)
    arguments.out.with_suffix(".json").write_text(text, "utf-8")
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
