"""In how many partitions a plan's rows come, where the plan alone can tell."""

from __future__ import annotations

import math

from spark_llm.optimizer.catalyst.bridge import Catalyst, Jvm, Node, items

# Nodes that leave rows in their partitions, and in their order there.
IN_PLACE = {
    "ArrowEvalPython",
    "BatchEvalPython",
    "Expand",
    "Filter",
    "Generate",
    "Project",
    "ResolvedHint",
    "Sample",
    "SubqueryAlias",
}


def num_partitions(plan: Node, session: Jvm, catalyst: Catalyst) -> int | None:
    """Partitions of ``plan``; None where it depends on a shuffle, a join or the data."""
    name = str(plan.nodeName())
    if name in IN_PLACE or (name == "Sort" and not getattr(plan, "global")()):
        return num_partitions(plan.child(), session, catalyst)
    if name == "GlobalLimit":
        return 1
    if name == "Repartition":
        below = None if plan.shuffle() else num_partitions(plan.child(), session, catalyst)
        asked = int(plan.numPartitions())
        return asked if below is None else min(asked, below)
    if name == "RepartitionByExpression":
        return int(plan.optNumPartitions().get()) if plan.optNumPartitions().isDefined() else None
    if name == "Union":
        parts = [num_partitions(child, session, catalyst) for child in items(plan.children())]
        return None if None in parts else sum(part for part in parts if part is not None)
    slots = int(session.sparkContext().defaultParallelism())
    if name == "Range":
        return int(plan.numSlices().get()) if plan.numSlices().isDefined() else slots
    if name == "LocalRelation":
        return max(1, min(slots, int(plan.data().size())))
    if catalyst.is_file_relation(plan):
        return _splits(plan.relation(), session, slots)
    return catalyst.rdd_partitions(plan)


def _splits(relation: Jvm, session: Jvm, slots: int) -> int:
    """About the partitions that Spark packs a table of files into (FilePartition.maxSplitBytes)."""
    conf = session.sessionState().conf()
    opening = int(conf.filesOpenCostInBytes())
    files, size = len(relation.location().inputFiles()), int(relation.sizeInBytes())
    total = size + files * opening
    largest = min(int(conf.filesMaxPartitionBytes()), max(opening, total // slots))
    return 1 if files == 1 and size <= largest else max(1, math.ceil(total / largest))
