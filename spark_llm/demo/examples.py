"""The files of sql_examples: a comment, one view that is the query's input, one SELECT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "sql_examples"


@dataclass(frozen=True, slots=True)
class Example:
    """One file. ``view`` is the name that ``create_view`` makes and ``select`` reads; ``dataset`` has its tables."""

    name: str
    title: str
    dataset: str
    view: str
    create_view: str
    select: str

    @property
    def is_aggregate(self) -> bool:
        """Whether a row of the result stands for several input rows."""
        return re.search(r"\bGROUP BY\b", self.select, re.IGNORECASE) is not None


def read(path: Path) -> Example:
    """Parse one file; ValueError for one that is built otherwise."""
    lines = path.read_text("utf-8").splitlines()
    comments = [line[2:].strip() for line in lines if line.startswith("--")]
    dataset = next((c.removeprefix("data: ") for c in comments if c.startswith("data: ")), None)
    text = "\n".join(line for line in lines if not line.startswith("--"))
    statements = [part.strip() for part in re.split(r";\s*$", text, flags=re.MULTILINE) if part.strip()]
    view = re.match(r"CREATE OR REPLACE TEMPORARY VIEW (\w+) AS", statements[0]) if statements else None
    if dataset is None or view is None or len(statements) != 2:
        raise ValueError(f"{path}: expected '-- data: NAME', one CREATE OR REPLACE TEMPORARY VIEW and one SELECT")
    title = comments[0].split(":")[0].lower()
    return Example(path.stem, title, dataset, view[1], statements[0], statements[1])


def read_all(folder: Path = FOLDER) -> list[Example]:
    """All examples in the order of their numbers; FileNotFoundError where there are none."""
    paths = sorted(folder.glob("*.sql"))
    if not paths:
        raise FileNotFoundError(f"No *.sql in {folder}: the demo runs from a checkout of the repository.")
    return [read(path) for path in paths]
