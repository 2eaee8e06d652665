"""A join on a call's answer asks about the pairs that its other conditions leave, whatever kind of join it is.

before                                         after
------                                         -----
Join LeftOuter, (k = j AND llm(.., a, b) = 'x') Project [a, IF(ok, b, NULL) AS b]
:- Relation [k, a]                             +- Filter (ok OR n = 1)
+- Relation [j, b]                                +- Window [row_number() AS n], [row_id], [ok DESC]
                                                     +- Project [a, b, row_id, there AND llm(.., a, b) = 'x' AS ok]
                                                        +- Join LeftOuter, (k = j)
                                                           :- Project [k, a, row_id]
                                                           +- Project [j, b, true AS there]

For inner joins Spark itself puts the call's conditions into a Filter above the join of the others; for all other kinds
it throws. So does it for EXISTS, NOT EXISTS and IN with a call over both tables, which are joins, too. A pair that the
cheap conditions leave is asked about once; rows that no pair has are not asked about. Rows of both sides keep their
number as in any join: each row has an id for the time of the join. A call over one side only stays where it is.
"""

from __future__ import annotations

from spark_llm.optimizer.catalyst.bridge import Expression, Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.mask_conditional_calls import with_masks
from spark_llm.optimizer.rules.outer_pairs import join_of_pairs

NAME = "semanticJoin"


def semantic_join(plan: Node, context: Context) -> Node:
    """Rewrite the joins of ``plan`` on a call over both sides that Spark would refuse."""
    if plan.isStreaming():
        return plan
    pairs = context.catalyst.questions("Pairs")
    plan = pairs.withoutSubqueries(plan)

    def judge(condition: Expression) -> Expression:
        return with_masks(condition, NAME, context)

    while (found := pairs.find(plan)) is not None:
        join, cheap, dear = found
        made = join_of_pairs(join, cheap, dear, judge, context.catalyst)
        if made is None:
            return plan
        plan = pairs.replaced(plan, join, made)
    return plan
