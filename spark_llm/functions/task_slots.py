"""How many tasks the calls of one query may take at a time, by what Spark says of its executors (CONTRACTS.md 19)."""

from __future__ import annotations

from spark_llm.cores import EXECUTOR_KEYS, executor_cores, executors
from spark_llm.optimizer.catalyst.bridge import Jvm


def call_tasks(spark: Jvm, known: int, per_executor: int) -> int:
    """Tasks, over all executors of ``spark``, a JVM SparkContext; 0: as many as Spark runs.

    known: executors that run now. per_executor: tasks of one; 0: half of its slots, at least one. Nothing is held
    back where that would be all slots, and where Spark starts as many executors as tasks wait for.
    """
    slots = int(spark.maxNumConcurrentTasks(spark.resourceProfileManager().defaultResourceProfile())) // known
    if not spark.isLocal():
        conf = spark.conf()
        settings = {key: str(conf.get(key)) for key in EXECUTOR_KEYS if conf.contains(key)}
        is_dynamic = settings.get("spark.dynamicAllocation.enabled") == "true"
        if is_dynamic and "spark.dynamicAllocation.maxExecutors" not in settings:
            return 0
        known = max(known, executors(settings))
        slots = slots or executor_cores(settings) // int(conf.get("spark.task.cpus", "1"))
    held = per_executor or max(1, slots // 2)
    return held * known if held < slots else 0
