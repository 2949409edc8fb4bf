"""A process that is started again a moment after it died, whatever killed it, until it is told to end."""

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import ROOT

END_WITHIN_S = 30


@dataclass
class Keeper:
    """Keeps one process alive. `pause_s` is the time between its death and its next start."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    pass_fds: tuple[int, ...] = ()
    pause_s: float = 0.2
    cwd: Path = ROOT
    starts: int = 0
    _ending: threading.Event = field(default_factory=threading.Event)
    _process: "subprocess.Popen[bytes] | None" = None
    _thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        """Begin to keep it alive."""
        self._spawn()
        self._thread = threading.Thread(target=self._keep, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask it to leave, and kill it where it does not."""
        self._ending.set()
        process, thread = self._process, self._thread
        if process is None or thread is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        thread.join(END_WITHIN_S)
        if thread.is_alive():
            process.kill()
            thread.join()

    def _keep(self) -> None:
        while True:
            assert self._process is not None
            self._process.wait()
            if self._ending.wait(self.pause_s):
                return
            self._spawn()

    def _spawn(self) -> None:
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                self.argv,
                cwd=self.cwd,
                env=dict(self.env),
                stdout=sink,
                stderr=subprocess.STDOUT,
                pass_fds=self.pass_fds,
                start_new_session=True,
            )
        self.starts += 1
