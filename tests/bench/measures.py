"""Percentiles of measured times, and the processes and the store that are measured."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
import redis


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def ms(seconds: float) -> str:
    """Seconds as milliseconds for a table."""
    return f"{seconds * 1000:.1f} ms"


def gateway_workers(launcher: int) -> list[psutil.Process]:
    """The gateway's processes under a `python -m deploy up`."""
    return _below(launcher, lambda command: command[1:3] == ["-m", "agents"])


def engine_replicas(launcher: int) -> list[psutil.Process]:
    """The engine replicas under a `python -m deploy up`; Ray names its processes so."""
    return _below(launcher, lambda command: "ServeReplica:onebox:engine" in " ".join(command))


def store_of(home: Path) -> redis.Redis:
    """A client of the store that the product keeps in its home."""
    lines = (home / "store" / "valkey.conf").read_text(encoding="utf-8").splitlines()
    options = dict(line.split(" ", 1) for line in lines if " " in line)
    return redis.Redis(port=int(options["port"]), password=options["requirepass"])


def resident_mib(processes: Iterable[psutil.Process]) -> float:
    """Their resident memory together, MiB."""
    return sum(process.memory_info().rss for process in processes) / 2**20


def _below(launcher: int, wanted: Callable[[list[str]], bool]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if wanted(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
