"""The schedulers by name: an order of rows, and how clients share the engine."""

from __future__ import annotations

from collections.abc import Callable

from spark_llm.engine.scheduling.fair import FairQueue
from spark_llm.engine.scheduling.sharing import Counters, Deficits
from spark_llm.engine.scheduling.waiting import FirstComeFirstServed, LongestPrefixFirst, WaitingQueue


def waiting_queue(scheduler: str, quantum: float) -> WaitingQueue:
    """The queue of a scheduler's name (see EngineSpec.scheduler), empty. quantum: weighted tokens, above 0."""
    return _QUEUES[scheduler](quantum)


_QUEUES: dict[str, Callable[[float], WaitingQueue]] = {
    "dlpm": lambda quantum: FairQueue(lambda: Deficits(quantum), LongestPrefixFirst),
    "vtc": lambda quantum: FairQueue(Counters, FirstComeFirstServed),
    "lpm": lambda quantum: LongestPrefixFirst(),
    "fcfs": lambda quantum: FirstComeFirstServed(),
}
