"""Draws what clients were given over time from what fairness.py measured, and keeps the numbers beside the picture.

.venv/bin/python benchmarks/fairness.py --part papers && .venv/bin/python benchmarks/plot_fairness.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairness import path_of
from fairness_run import Outcome
from plot_demo import NAIVE, OURS, ROOT, SHARED

SHOWN = ("on and off", "short and long", "disjoint prefixes")
ORDER = ("fcfs", "lpm", "vtc", "dlpm")
COLOURS = (SHARED, OURS, NAIVE, "#c0803a")


def draw(record: Mapping[str, Any], out: Path) -> None:
    """A line of panels for each experiment, one for each scheduler: thousand tokens of service over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "spark-llm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    outcomes = [Outcome(**outcome) for outcome in record["outcomes"]]
    names = [name for name in SHOWN if any(outcome.experiment == name for outcome in outcomes)]
    figure, panels = pyplot.subplots(
        len(names), len(ORDER), figsize=(9, 2.1 * len(names) + 0.4), sharex=True, sharey="row", layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for line, name in zip(panels, names, strict=True):
        for panel, scheduler in zip(line, ORDER, strict=True):
            outcome = next(found for found in outcomes if (found.experiment, found.scheduler) == (name, scheduler))
            for (client, curve), colour in zip(outcome.curves.items(), COLOURS, strict=False):
                panel.plot(outcome.times, [given / 1000 for given in curve], color=colour, label=client, linewidth=1.3)
            panel.set_title(f"{scheduler}: {outcome.tokens:,.0f} tokens/s", fontsize=9)
        line[0].set_ylabel(f"{name}\nservice, 1,000 tokens")
        line[0].legend(frameon=False, fontsize=8, loc="upper left")
    for panel in panels[-1]:
        panel.set_xlabel("seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=150)


def kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture shows, and where it comes from."""
    shown = [outcome for outcome in record["outcomes"] if outcome["experiment"] in SHOWN]
    return {**record, "outcomes": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=path_of("papers", "sim"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "fairness.svg")
    arguments = parser.parse_args()
    if not arguments.json.is_file():
        raise SystemExit(f"{arguments.json} is missing: run `fairness.py --part papers` first.")
    record = kept(json.loads(arguments.json.read_text("utf-8")))
    draw(record, arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(record), "utf-8")
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
