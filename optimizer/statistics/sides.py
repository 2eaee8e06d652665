"""Which side of a join without an equality stands first in the prompts of its pairs, where no sample tells.

Every row of a side meets every row of the other. Prompts that begin with the left row share its text among all of its
pairs: with L and R different texts of l and r bytes, L l + L R r bytes are computed, and R r + L R l with the right row
first. So the side with the longer rows leads, whichever has more of them. It is the left one unless the counts, which a
job takes of each side by itself, say that the right one saves a tenth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from spark_llm.optimizer.catalyst.bridge import Expression, Node, items
from spark_llm.optimizer.statistics.joins import Key, Question, count_tuples
from spark_llm.optimizer.statistics.plain import leaves

if TYPE_CHECKING:
    from spark_llm.optimizer.catalyst.context import Context

_SAVES = 0.1  # share of what is computed with the left side first
_PASSED = {
    "Filter",
    "Project",
    "RebalancePartitions",
    "Repartition",
    "RepartitionByExpression",
    "ResolvedHint",
    "Sort",
    "SubqueryAlias",
}


class Lead(NamedTuple):
    """The side that leads. tables: numbers of its tables among the plan's ``leaves``. why: in words."""

    tables: range
    why: str


def leading_side(plan: Node, arguments: list[Expression], context: Context) -> Lead | None:
    """The side of the join whose pairs ``plan`` gives, where a call asks about both; None for other plans."""
    catalyst = context.catalyst
    join = plan
    while join.nodeName() in _PASSED:
        join = join.child()
    if join.nodeName() != "Join" or catalyst.has_equality(join):
        return None
    below = catalyst.questions("Conditions").below
    found = [below(argument, plan, join) for argument in arguments if not argument.foldable()]
    clean = catalyst.questions("Pairs").withoutRowIds(join)
    sides = []
    for side in items(clean.children()):
        own = tuple(argument for argument in found if catalyst.has_input(argument, side))
        if not own:
            return None
        sides.append(Question(side, (Key(own),)))
    left, right = (len(leaves(side.plan)) for side in sides)
    counted = count_tuples(sides, context)
    if counted is None or any(side.row_bytes is None for side in counted):
        return Lead(range(left), "the left side of its pairs first")
    rows = [side.distinct[0] for side in counted]
    sizes = [side.row_bytes or 0.0 for side in counted]
    computed = [rows[i] * sizes[i] + rows[0] * rows[1] * sizes[1 - i] for i in range(2)]
    lengths = f"{sizes[0]:,.0f} bytes a row against {sizes[1]:,.0f}"
    if computed[1] < (1 - _SAVES) * computed[0]:
        return Lead(range(left, left + right), f"the right side of its pairs first, as left rows have {lengths}")
    return Lead(range(left), f"the left side of its pairs first: {lengths}")
