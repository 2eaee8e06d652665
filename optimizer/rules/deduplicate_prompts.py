"""Equal argument tuples are answered once per query.

before                                            after
------                                            -----
ArrowEvalPython [llm({spec}, 'p', info)]          ArrowEvalPython [llm({spec, fold}, 'p', info)]
+- Relation [info]                                +- Relation [info]

The plan keeps its shape: no join, no aggregate. Rows with equal arguments meet by the exchange of ReorderRows where
that is worth one, and stand next to each other by its sort; a task looks rows up by their canonical arguments before
it renders anything, and the engine answers a request whose equal is in flight, or was answered for the same query,
with that answer. Calls that draw their answers without a seed are left alone: each of their rows is asked.
"""

from __future__ import annotations

import msgspec

from spark_llm.call import CallSpec, RowPlan
from spark_llm.optimizer.catalyst.bridge import Node
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import Call, change_specs, no_function


def deduplicate_prompts(plan: Node, context: Context) -> Node:
    """Let each repeatable call of ``plan`` fold rows with equal arguments."""
    return change_specs(plan, context.catalyst, _folded, no_function)


def _folded(call: Call) -> CallSpec:
    rows = call.spec.rows or RowPlan()
    if rows.fold or rows.fold_why:
        return call.spec
    if call.spec.is_repeatable:
        rows = msgspec.structs.replace(rows, fold=True)
    else:
        rows = msgspec.structs.replace(rows, fold_why="drawn without a seed")
    return msgspec.structs.replace(call.spec, rows=rows)
