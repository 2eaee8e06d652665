"""The keys of how queries share engines and task slots: who asks, by which weight, and in how many tasks."""

from __future__ import annotations

import dataclasses

from spark_llm.config_kinds import OPTIONAL_TEXT, Kind, choice, integer, key

SCHEDULERS = ("dlpm", "vtc", "lpm", "fcfs")


def _weight(text: str) -> float:
    weight = float(text)
    if weight and not 1e-6 <= weight <= 1e6:  # engines refuse others
        raise ValueError
    return weight


WEIGHT = Kind("a number from 1e-6 to 1e6, or 0 for that of the pool", _weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingConf:
    """Scheduler, client and task slots."""

    scheduler: str = key(
        "scheduler",
        choice(*SCHEDULERS),
        "dlpm",
        "Which waiting row an engine takes next. `dlpm`: the longest cached prefix, among the clients that have not "
        "had more than their share of what is computed; `vtc`: the client that has had least, counting whole prompts; "
        "`lpm`: the longest cached prefix, whosever it is; `fcfs`: first come, first served. Set it for the "
        "application: sessions with another value use another engine.",
    )
    scheduler_quantum: int = key(
        "scheduler.quantum",
        integer(0),
        "0",
        "With `dlpm`: service (tokens computed, those of answers twice) that a client gets before others are due, "
        "times its weight. More keeps more prefixes together, less shares more closely; 0 lets the engine choose.",
    )
    client: str = key(
        "client",
        OPTIONAL_TEXT,
        "",
        "Whom engines charge for a query's rows: clients share an engine by their weights, the queries of one client "
        "share alike what it gets. Empty: the Spark scheduler pool, else the user of Spark Connect, else the session.",
    )
    client_weight: float = key(
        "client.weight",
        WEIGHT,
        "0",
        "The client's share of an engine beside others'; 0 is the weight of its pool in Spark's fair scheduler "
        "allocation file, else 1.",
    )
    tasks_per_engine: int = key(
        "tasksPerEngine",
        integer(0),
        "0",
        "Tasks of an executor that the calls of one query may take at a time, so that another query's find free ones; "
        "0 is half of its slots, at least one.",
    )
