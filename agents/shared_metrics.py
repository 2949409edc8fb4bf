"""Metrics of all gateway workers of one machine, in memory-mapped files, so that any of them can answer for all.

Each worker writes the files of its place among the workers (0, 1, …), which its successor goes on with: a counter never
falls, and there are as many files as places. It is prometheus_client's multiprocess mode with places for pids. A
worker alone in its pod or container needs none of this.
"""

import glob
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

# Files are allocated at the start: a write to a page of a sparse file on a full disk would kill the process.
FILE_BYTES: Final = {"counter": 128 * 1024, "histogram": 512 * 1024, "gauge_livesum": 64 * 1024}


def metrics_folder(home: Path) -> Path:
    """The folder that the workers of an instance share; whoever starts them empties it before."""
    return home / "run" / "metrics"


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's own number among those that share `folder`. No two live processes may have the same."""

    folder: Path
    number: int

    def take(self) -> None:
        """Let every metric made from now on in this process live in the place's files.

        Raises:
            OSError: they cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, size in FILE_BYTES.items():
            file = self.folder / f"{kind}_{self.number}.db"
            if kind.startswith("gauge"):
                file.unlink(missing_ok=True)  # what the one before had going on ended with it
            with file.open("ab") as opened:
                os.posix_fallocate(opened.fileno(), 0, size)
        (self.folder / f"{self.number}.pid").write_text(str(os.getpid()))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.folder)
        number = self.number
        values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]  # as its docs say

    def registry(self) -> CollectorRegistry:
        """What all workers have counted."""
        registry = CollectorRegistry()
        registry.register(_Workers(self.folder))
        return registry


class _Workers(Collector):
    """The sum of the files; gauges of workers that are dead do not count."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self):  # type: ignore[no-untyped-def]  # prometheus_client gives `merge` no types
        dead = [pid.stem for pid in self._folder.glob("*.pid") if not _lives(pid)]
        gone = {str(self._folder / f"gauge_livesum_{number}.db") for number in dead}
        files = [file for file in glob.glob(f"{glob.escape(str(self._folder))}/*.db") if file not in gone]
        return MultiProcessCollector.merge(files, accumulate=True)  # type: ignore[no-untyped-call]  # as above


def _lives(pid: Path) -> bool:
    with suppress(OSError, ValueError):
        os.kill(int(pid.read_text()), 0)
        return True
    return False
