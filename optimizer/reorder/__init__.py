"""Order of rows and of fields, so that prompts share prefixes: ``solve`` for a table in memory, ``plan_order`` for the
order table of a query, ``window`` for the rows of a task. numpy and pyarrow only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spark_llm.optimizer.reorder.measure import Lengths, Render, Schedule

__all__ = ["solve"]


def solve(table: Any, *, lengths: Lengths | None = None, render: Render | None = None) -> Schedule:
    """The rows of ``table`` in an order, and each row's fields in an order, in which rows share long prefixes.

    ``table`` is a pandas DataFrame or a pyarrow Table. Returns its rows, each a list of ``(field, value)``, with the
    values as they were, None for NULL; nothing is lost and equal rows are kept.

    ``render(field, value)`` gives a cell's text, by default the value's own text ('' for None). Cells of a field are
    equal if their texts are, and both or neither are NULL. ``lengths`` measures texts, for example by a tokenizer: one
    text → number, or a list of texts → sequence of numbers; by default characters. Deterministic.
    Raises [LLM_INVALID_TABLE] 22023 on anything that is no table, or where ``lengths`` or ``render`` give what they
    must not.

    The objective is the prefix hit count of Liu et al., arXiv 2403.05821 (``measure.phc``).
    """
    import numpy as np

    from spark_llm.optimizer.reorder.codes import encode
    from spark_llm.optimizer.reorder.solver import solve_cells

    coded = encode(table, lengths, render)
    found = solve_cells(coded.cells, coded.lengths)
    ordered = np.take_along_axis(coded.values, found.orders, axis=1)[found.rows]
    schedule: Schedule = coded.shown[ordered].tolist()
    return schedule
