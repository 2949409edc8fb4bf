"""The running instance of one `ONEBOX_HOME`: at most one, findable by `down` and `status`."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from onebox.errors import SetupError


@dataclass(frozen=True, slots=True)
class Instance:
    """Who runs and where it listens. `started` is the process's creation time, so a reused pid is no match."""

    id: str
    pid: int
    started: float
    api_url: str
    ui_url: str
    children: dict[str, int]

    def process(self) -> psutil.Process | None:
        """The supervisor's process, if it still lives."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < 1:
                return process
        return None


def write(home: Path, instance: Instance) -> None:
    """Publish the instance for other commands, atomically."""
    target = _file(home)
    fresh = target.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(instance)), encoding="utf-8")
    fresh.replace(target)


def read(home: Path) -> Instance | None:
    """The instance that runs under `home`, or None."""
    try:
        instance = Instance(**json.loads(_file(home).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return instance if instance.process() is not None else None


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the home for this process.

    Raises:
        SetupError: another instance holds it.
    """
    run = _file(home).parent
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = read(home)
            where = f" (open {other.ui_url})" if other else ""
            raise SetupError(
                f"Onebox is already running under {str(home)!r}{where}. "
                "Use it, end it with python -m deploy down, or set ONEBOX_HOME to another folder."
            ) from None
        yield
        _file(home).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _file(home: Path) -> Path:
    return home / "run" / "instance.json"
