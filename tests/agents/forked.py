"""Processes that begin as copies of one that has imported what they need: each is there two seconds sooner."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Final
from unittest.mock import patch

from tests.processes import ROOT

MODULES: Final = ("agents", "tests.agents.scripted_replica")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["agents.app", "serving.scripted_engine", "serving.server", "uvicorn", __name__])


class Forked:
    """`python -m module arguments` without the time that imports take, with what tests use of `subprocess.Popen`."""

    def __init__(self, module: str, arguments: tuple[str, ...], environment: Mapping[str, str], log: Path) -> None:
        with patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):  # read when numpy is imported, so by the server
            forkserver.ensure_running()
        self._process = _CONTEXT.Process(
            target=_run, args=(module, arguments, dict(environment), str(log)), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self._process.exitcode


def _run(module: str, arguments: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(sink, number)
    os.close(sink)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
