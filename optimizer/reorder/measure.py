"""What a schedule of rows is worth: prefix hit count (PHC) and prefix hit rate (PHR), Liu et al., arXiv 2403.05821.

A schedule is a list of rows, each a list of ``(field, value)`` cells in its own order. Two cells are equal if their
field and their text are, and both or neither are None; hits are whole cells. One variant takes schedules, one tables of
codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Row = list[tuple[Any, Any]]
Schedule = list[Row]
Lengths = Callable[[Any], Any]
Render = Callable[[Any, Any], str]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def own_text(field: Any, value: Any) -> str:
    """The text of a value alone: what ``render`` is by default. Empty for None."""
    return "" if value is None else value if type(value) is str else str(value)


def measure_texts(texts: Sequence[str], lengths: Lengths | None) -> Floats:
    """The length of each text, float64 [texts]; characters where ``lengths`` is None.

    ``lengths`` takes one text and gives a number, or takes a list of texts and gives a sequence of numbers; which
    of both is asked once, with a list of two texts. Raises ValueError where a length is negative or not finite.
    """
    if lengths is None or lengths is len:
        return np.fromiter(map(len, texts), np.float64, len(texts))
    if not len(texts):
        return np.empty(0, np.float64)
    if takes_lists(lengths):
        found = np.asarray(lengths(list(texts)), np.float64)
    else:
        found = np.fromiter((float(lengths(text)) for text in texts), np.float64, len(texts))
    if found.shape != (len(texts),):
        raise ValueError(f"{len(texts)} texts were given to lengths, which gave {found.shape} lengths")
    if not np.isfinite(found).all() or (found < 0).any():
        raise ValueError("a length is a finite number that is not negative")
    return found


def takes_lists(lengths: Lengths) -> bool:
    """Whether ``lengths`` measures a list of texts at once."""
    try:
        found = np.asarray(lengths(["a", "b"]))
    except Exception:  # made for one text: what it makes of a list is not ours to know
        return False
    return found.shape == (2,) and found.dtype.kind in "iuf"


def cell_lengths(
    cells: Iterable[tuple[Any, Any]], lengths: Lengths | None, render: Render | None
) -> list[tuple[tuple[bool, str], float]]:
    """What tells each cell from others of its field (whether it is None, and its text), and its length."""
    show = render or own_text
    keys = [(value is None, show(field, value)) for field, value in cells]
    texts = [text for _, text in keys]
    distinct = list(dict.fromkeys(texts))
    length = dict(zip(distinct, measure_texts(distinct, lengths).tolist(), strict=True))
    return [(key, length[key[1]]) for key in keys]


_Measured = list[tuple[Any, tuple[bool, str], float]]


def _measured(schedule: Schedule, lengths: Lengths | None, render: Render | None) -> list[_Measured]:
    """The schedule with keys and lengths for values."""
    cells = iter(cell_lengths((cell for row in schedule for cell in row), lengths, render))
    return [[(field, *next(cells)) for field, _ in row] for row in schedule]


def _hits(before: _Measured, row: _Measured) -> list[float]:
    """The lengths of the leading cells that ``row`` has in common with the row before it."""
    found = []
    for old, new in zip(before, row, strict=False):
        if old != new:
            break
        found.append(new[2])
    return found


def phc(schedule: Schedule, *, lengths: Lengths | None = None, render: Render | None = None) -> float:
    """Prefix hit count: over all rows, squared lengths of the leading cells equal to those of the row before."""
    rows = _measured(schedule, lengths, render)
    return sum(length * length for pair in itertools.pairwise(rows) for length in _hits(*pair))


def phr(schedule: Schedule, *, lengths: Lengths | None = None, render: Render | None = None) -> float:
    """Prefix hit rate: the length of those cells by the length of all cells, 0 to 1. No instruction is counted."""
    rows = _measured(schedule, lengths, render)
    total = sum(length for row in rows for _, _, length in row)
    hits = sum(length for pair in itertools.pairwise(rows) for length in _hits(*pair))
    return hits / total if total else 0.0


def cached_share(schedule: Schedule, *, lengths: Lengths | None = None, render: Render | None = None) -> float:
    """The same rate for a cache that holds every earlier row and not only the one before, 0 to 1."""
    total = hits = 0.0
    cache: dict[Any, Any] = {}
    for row in _measured(schedule, lengths, render):
        node = cache
        known = True
        for field, key, length in row:
            total += length
            known = known and (field, key) in node
            hits += length if known else 0.0
            node = node.setdefault((field, key), {})
    return hits / total if total else 0.0


class CodedMeasure(NamedTuple):
    """Of a table of codes in one schedule: ``phc`` and ``phr`` as above, ``cached`` as ``cached_share``."""

    phc: float
    phr: float
    cached: float


def measure_coded(
    codes: npt.NDArray[np.integer], lengths: Floats, rows: npt.NDArray[np.integer], orders: npt.NDArray[np.integer]
) -> CodedMeasure:
    """Measure a schedule of coded rows.

    ``codes`` [rows, fields]: equal within a field where the cells are; ``lengths`` [rows, fields]; ``rows`` [rows]:
    the rows in their order; ``orders`` [rows, fields]: the field order of each row (as in the table, not as scheduled).
    """
    count, fields = codes.shape
    total = float(lengths.sum())
    if count < 2 or fields == 0 or total == 0:
        return CodedMeasure(0.0, 0.0, 0.0)
    order = orders[rows].astype(np.int64)
    length = np.take_along_axis(lengths[rows], order, 1)
    code = np.take_along_axis(codes[rows], order, 1)
    run = np.logical_and.accumulate((code[1:] == code[:-1]) & (order[1:] == order[:-1]), axis=1)
    hit = length[1:] * run
    # The first row with a prefix computes it. ``known`` numbers each prefix; one column of cells at a time extends it.
    known, missed = np.zeros(count, np.int64), 0.0
    for position in range(fields):
        cells = np.unique(code[:, position].astype(np.int64) * fields + order[:, position], return_inverse=True)[1]
        _, first, known = np.unique(known * count + cells, return_index=True, return_inverse=True)
        missed += float(length[first, position].sum())
        if len(first) == count:
            missed += float(length[:, position + 1 :].sum())
            break
    return CodedMeasure(float((hit * length[1:]).sum()), float(hit.sum()) / total, 1 - missed / total)
