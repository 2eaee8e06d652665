"""How many executors there are and how many cores each has, as Spark's settings and the operating system tell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

EXECUTOR_KEYS = (
    "spark.master",
    "spark.executor.cores",
    "spark.executor.instances",
    "spark.cores.max",
    "spark.dynamicAllocation.enabled",
    "spark.dynamicAllocation.maxExecutors",
)  # what the functions below read


def executors(settings: Mapping[str, str]) -> int:
    """The most executors of the application as Spark's settings tell them; 1 where they do not say."""

    def number(name: str) -> int:
        text = settings.get(name, "")
        return int(text) if text.isdigit() else 0

    master = settings.get("spark.master", "")
    if match := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,.*\]", master):
        return max(1, int(match[1]))
    if master.startswith("local"):
        return 1
    if settings.get("spark.dynamicAllocation.enabled", "") == "true":
        return max(1, number("spark.dynamicAllocation.maxExecutors"))
    cores = number("spark.executor.cores")
    by_cores = number("spark.cores.max") // cores if cores else 0
    return max(1, number("spark.executor.instances") or by_cores)


def executor_cores(settings: Mapping[str, str]) -> int:
    """Cores of one executor as Spark's settings tell them; 0 where they mean all cores of the machine."""
    master = settings.get("spark.master", "")
    if match := re.fullmatch(r"local\[([0-9]+)(?:,.*)?\]", master):
        return int(match[1])
    if match := re.fullmatch(r"local-cluster\[\s*\d+\s*,\s*(\d+)\s*,\s*\d+\s*\]", master):
        return int(match[1])
    if master == "local":
        return 1
    if (cores := settings.get("spark.executor.cores", "")).isdigit():
        return int(cores)
    # A standalone or local[*] executor takes the whole machine; YARN and Kubernetes give it one core.
    return 0 if not master or master.startswith(("local[", "spark://")) else 1


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
