"""Percentiles of measured times, and the memory of processes."""

import math
from collections.abc import Iterable, Sequence

import psutil


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def ms(seconds: float) -> str:
    """Seconds as milliseconds for a table."""
    return f"{seconds * 1000:.1f} ms"


def gateway_workers(launcher: int) -> list[psutil.Process]:
    """The gateway's processes under a `python -m deploy up`."""
    found: list[psutil.Process] = []
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.Error:
            continue
        if command[1:3] == ["-m", "agents"]:
            found.append(child)
    return found


def resident_mib(processes: Iterable[psutil.Process]) -> float:
    """Their resident memory together, MiB."""
    return sum(process.memory_info().rss for process in processes) / 2**20
