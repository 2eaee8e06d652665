"""A LIMIT that does not depend on a call's answers runs before the call.

before                                            after
------                                            -----
GlobalLimit 3                                     Project [id, pythonUDF0 AS answer]
+- LocalLimit 3                                   +- ArrowEvalPython [llm(.., 'p', text)]
   +- Sort [id ASC], true                            +- GlobalLimit 3
      +- Project [id, pythonUDF0 AS answer]             +- LocalLimit 3
         +- ArrowEvalPython [llm(.., 'p', text)]           +- Sort [id ASC], true
            +- Relation [id, text]                            +- Relation [id, text]

Spark would answer all rows and sort them for the first three; and where it does put a limit below a call, each of the
partitions takes its share. With the limit below, no more rows are asked than the query returns, OFFSET's are not, and
the order of the rows stays: they come from one partition. A LocalLimit that Spark put below a UNION ALL or an outer
join is for rows of which no more are needed in all, so it becomes a limit of that branch. No limit passes a filter, a
sort by the call's answers, or what is made at random; and none gathers rows whose order Spark would keep otherwise.

The rows that an OFFSET without a LIMIT drops are not asked about either. Where these are the first ones of an ORDER BY,
rows are numbered below the call, and the sort stands above it, so that all tasks may answer what is left:

Offset 3                                          Sort [id ASC], true
+- Sort [id ASC], true                            +- Project [id, pythonUDF0 AS answer]
   +- Project [id, pythonUDF0 AS answer]             +- ArrowEvalPython [llm(.., 'p', text)]
      +- ArrowEvalPython [llm(.., 'p', text)]           +- Filter (row_number > 3)
         +- Relation [id, text]                            +- Window [row_number() AS row_number], [id ASC]
                                                              +- Relation [id, text]

At the root of a query, over a table whose first partition alone has rows to spare, the limit stays: Spark asks n rows
of that partition and looks at no other, while a limit below the call would read some of all of them.
"""

from __future__ import annotations

import dataclasses

import msgspec

from spark_llm.call import RowPlan
from spark_llm.optimizer.catalyst.bridge import Jvm, Node, elements, items
from spark_llm.optimizer.catalyst.context import Context
from spark_llm.optimizer.rules.calls import all_calls, calls_of, label_of, rebuilt, rewrite
from spark_llm.optimizer.statistics.partitions import num_partitions

_NAME = "limitBeforeCalls"
_SPARE = 16  # times as many rows as the limit takes, by the size of the table
_ROW_OVERHEAD = 8


def limit_before_calls(plan: Node, context: Context) -> Node:
    """Move the limits of ``plan`` below calls."""
    if plan.isStreaming():
        return plan
    questions = context.catalyst.questions("Limits")
    stays = _first_partition_will_do(plan, questions, context)
    if stays:
        for call in all_calls(plan, context.catalyst):
            context.notes.declined(_NAME, call.label, "the table's first partition has rows to spare for the LIMIT")
    changed, notes = questions.moved(plan, not stays)
    for note in elements(notes):
        what, prompt = str(note)[1:].split("\x1f", 1)
        label = label_of(prompt)
        if str(note).startswith("-"):
            context.notes.declined(_NAME, label, what)
        elif str(note).startswith(">"):
            context.notes.fired(_NAME, label, f"not asked for the first {int(what):,} rows: OFFSET runs before it")
        else:
            context.notes.fired(_NAME, label, f"asked for at most {int(what):,} rows: a LIMIT runs before it")
    return rewrite(changed, context.catalyst, lambda node: _in_one_window(node, questions, context))


def _first_partition_will_do(plan: Node, questions: Jvm, context: Context) -> bool:
    leaf = questions.straightLeaf(plan)
    if leaf is None:
        return False
    partitions = num_partitions(leaf, context.session, context.catalyst)
    rows = int(questions.rowsTaken(plan))
    if partitions is None or partitions < 2 or rows < 0:
        return False
    return _rows(leaf, context) >= _SPARE * rows * partitions


def _rows(leaf: Node, context: Context) -> float:
    """About how many rows the leaf has, rather too few."""
    found = leaf.stats()
    if found.rowCount().isDefined():
        return float(found.rowCount().get())
    width = sum(int(column.dataType().defaultSize()) for column in items(leaf.output())) + _ROW_OVERHEAD
    return float(found.sizeInBytes()) / width


def _in_one_window(node: Node, questions: Jvm, context: Context) -> Node:
    """The call as it is where a limit below lets through no more rows than a task sorts anyway, with a word to
    ReorderRows that it should leave them in their order and where they are."""
    if not 0 <= int(questions.limitBelow(node.child())) <= context.window_rows:
        return node
    calls = calls_of(node)
    if any(call.spec.rows is not None and call.spec.rows.order_why for call in calls):
        return node
    marked = []
    for call in calls:
        rows = msgspec.structs.replace(call.spec.rows or RowPlan(), order_why="as they come: below a LIMIT")
        marked.append(dataclasses.replace(call, spec=msgspec.structs.replace(call.spec, rows=rows)))
    return rebuilt(node, marked, context.catalyst)
