"""The supervisor: starts child processes, keeps them alive, ends them all.

A crashed child comes back after a pause of 0.2 s, which doubles up to 10 s while it does not live for five seconds. A
child whose first start ends with `FATAL` says that starting again cannot help. What happens when the supervisor itself
is killed is `deploy.guardian`'s part.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.guardian import MARKER, descendants, sweep
from onebox.errors import SetupError

logger = logging.getLogger(__name__)

FATAL = 78  # EX_CONFIG of sysexits.h
BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 10.0
STEADY_S = 5.0

State = Literal["starting", "running", "waiting", "stopped"]


@dataclass(frozen=True, slots=True)
class Program:
    """What to run: `pass_fds` are sockets it inherits, `log` takes its stdout and stderr."""

    name: str
    argv: tuple[str, ...]
    log: Path
    env: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()
    stop_timeout_s: float = 10.0


class Child:
    """One program and the process that runs it now."""

    def __init__(self, program: Program, on_start: Callable[[], None]) -> None:
        self.program = program
        self._on_start = on_start
        self.state: State = "starting"
        self.pid: int | None = None
        self.restarts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._ending = asyncio.Event()

    async def keep_alive(self) -> None:
        """Run the program until `stop`. Raises `SetupError` when its first start ends with `FATAL`."""
        pause_s = BACKOFF_FIRST_S
        while not self._ending.is_set():
            started = time.monotonic()
            code = await self._run_once()
            self.pid = None
            if self._ending.is_set():
                break
            if code == FATAL and self.restarts == 0:
                self.state = "stopped"
                raise SetupError(last_line(self.program.log))
            if time.monotonic() - started > STEADY_S:
                pause_s = BACKOFF_FIRST_S
            self.restarts += 1
            self.state = "waiting"
            logger.warning("%s ended with code %s; starting again in %.1f s", self.program.name, code, pause_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause_s)
            pause_s = min(2 * pause_s, BACKOFF_MOST_S)
        self.state = "stopped"

    async def _run_once(self) -> int:
        self.program.log.parent.mkdir(parents=True, exist_ok=True)
        with self.program.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.program.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.program.env),
                pass_fds=self.program.pass_fds,
                # Its own session: a Ctrl-C in the terminal reaches the supervisor alone.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.state = "running"
        self._on_start()
        return await self._process.wait()

    async def stop(self) -> None:
        """Ask the process to leave, wait `stop_timeout_s`, then kill it."""
        self._ending.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        family = descendants(process.pid)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self.program.stop_timeout_s)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        for left in family:
            if left.is_running():
                with suppress(OSError):
                    os.kill(left.pid, signal.SIGTERM)


class Supervisor:
    """The children of one instance, in the order they were started; they are ended in reverse.

    `on_start` is called after each start, the first and every later one.
    """

    def __init__(self, instance: str, env: Mapping[str, str], on_start: Callable[[], None] = lambda: None) -> None:
        self.instance = instance
        self.env = {**env, MARKER: instance}
        self.children: dict[str, Child] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._gave_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._guardian: asyncio.subprocess.Process | None = None
        self._on_start = on_start

    async def __aenter__(self) -> "Supervisor":
        self._guardian = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "deploy.guardian", self.instance, str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=self.env,
            start_new_session=True,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        for child in reversed(self.children.values()):
            await child.stop()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        guardian = self._guardian
        if guardian is not None and guardian.stdin is not None:
            guardian.stdin.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(guardian.wait(), 15)
        await asyncio.to_thread(sweep, self.instance, (), 1.0)
        if self._gave_up.done():
            self._gave_up.exception()  # seen: asyncio would log it otherwise

    def start(self, program: Program) -> Child:
        """Run `program` and keep it alive until the supervisor leaves."""
        child = Child(program, self._on_start)
        self.children[program.name] = child
        task = asyncio.create_task(child.keep_alive(), name=program.name)
        task.add_done_callback(self._note_end)
        self._tasks[program.name] = task
        return child

    async def fail(self) -> None:
        """Wait until a child gives up for good. Raises its `SetupError`."""
        await asyncio.shield(self._gave_up)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._gave_up.done():
            self._gave_up.set_exception(error)


def last_line(log: Path) -> str:
    """The last line of a log that has text: what a program said before it left."""
    with suppress(OSError), log.open(encoding="utf-8", errors="replace") as lines:
        for line in reversed(deque((line.strip() for line in lines), maxlen=50)):
            if line:
                return line
    return f"A part of Onebox would not start and said nothing; its log is {str(log)!r}."
