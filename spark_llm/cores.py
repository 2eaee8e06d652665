"""How many cores an executor has, as Spark's settings and the operating system tell."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


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
