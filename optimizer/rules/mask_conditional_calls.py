"""Calls below CASE, IF, coalesce, IN, AND and OR are made only for rows that need their value.

before                                                     after
------                                                     -----
Project [CASE WHEN k = 1 THEN llm({spec}, 'p', text) END]   Project [CASE WHEN k = 1 THEN
+- Relation [k, text]                                                llm({spec, masked}, 'p', text, k = 1) END]
                                                           +- Relation [k, text]

Spark evaluates a Python function for all rows of an operator, whatever stands around it. Where Spark itself would stop
(from the left, in SQL's three-valued logic) the mask is false, and the call answers NULL without a call, which the
expression around it never looks at. What holds no call guards what holds one, wherever it stands; of two operands
with calls the first guards the second. Conditions stand in a mask in the order in which Spark would evaluate them, and
arguments that may fail (a division) are computed only where the mask holds, so that no error comes up that Spark would
not have met. The conjuncts of a filter are left to the rules for filters. The same call in several places of an
operator stays one call: it has a mask only if all places have one, and then any of theirs.
"""

from __future__ import annotations

import msgspec

from spark_llm.call import CallSpec
from spark_llm.optimizer.catalyst.bridge import Catalyst, Expression, Jvm, Node, elements
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import label_of

NAME = "maskConditionalCalls"


def mask_conditional_calls(plan: Node, context: Context) -> Node:
    """Write into each repeatable call of ``plan`` that some rows do not need which rows do."""
    return plan if plan.isStreaming() else with_masks(plan, NAME, context)


def with_masks(plan: Node | Expression, rule: str, context: Context) -> Jvm:
    """A plan, or an expression of a Project, with masks; ``rule`` is the one that says so in its notes."""
    catalyst = context.catalyst
    masks = catalyst.questions("Masks")
    # The first time tells which specs are needed, the second has them.
    found = masks.rewrite(plan, catalyst.jvm.java.util.HashMap())
    if not found[1].isEmpty():
        found = masks.rewrite(plan, _masked(elements(found[1]), catalyst))
    for is_masked, prompt, why in elements(found[2]):
        label = label_of(str(prompt))
        if is_masked:
            context.notes.fired(rule, label, f"asked only where {why}")
        else:
            context.notes.declined(rule, label, str(why))
    return found[0]


def _masked(specs: list[str], catalyst: Catalyst) -> Jvm:
    """The specs with a mask, as literals by the specs without."""
    found = catalyst.jvm.java.util.HashMap()
    for spec in specs:
        masked = msgspec.structs.replace(CallSpec.decode(spec), masked=True)
        found.put(spec, catalyst.literal(masked.encode()))
    return found
