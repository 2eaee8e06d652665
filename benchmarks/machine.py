"""What a measurement was made on: the processor and what it multiplies in hardware, cores, memory, load."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

# of /proc/cpuinfo's flags, those that decide how fast a matrix product can be
PRODUCT_FLAGS = ("avx2", "avx512f", "avx_ne_convert", "avx512_bf16", "amx_bf16")
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Machine:
    """load: runnable processes averaged over a minute, before anything was started; above 0.5 others disturb."""

    processor: str
    cores: int
    flags: list[str]
    memory_gib: float
    system: str
    load: float

    @property
    def has_bfloat16(self) -> bool:
        """Whether the processor multiplies bfloat16 in hardware."""
        return any(flag in self.flags for flag in BFLOAT16_FLAGS)

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gib:.0f} GiB, {' '.join(self.flags) or 'no AVX'}; "
            f"{self.system}; load before {self.load:.1f}"
        )


def this_machine() -> Machine:
    """The machine that this process runs on."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    present = set(fields.get("flags", "").split())
    return Machine(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=[flag for flag in PRODUCT_FLAGS if flag in present],
        memory_gib=psutil.virtual_memory().total / 2**30,
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        load=os.getloadavg()[0],
    )
