import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from deploy.guardian import MARKER, sweep
from deploy.supervisor import Program, Supervisor
from onebox.errors import SetupError

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(600)"


async def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


def program(tmp_path: Path, code: str, name: str = "child") -> Program:
    return Program(name, (sys.executable, "-c", code), tmp_path / f"{name}.log", os.environ)


async def test_a_killed_child_comes_back_with_another_pid(tmp_path: Path) -> None:
    pids: list[int | None] = []
    async with Supervisor("test-restart", os.environ, lambda: pids.append(child.pid)) as supervisor:
        child = supervisor.start(program(tmp_path, SLEEPER))
        await until(lambda: child.pid)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.pid not in {None, first})
        assert child.restarts == 1
        assert pids == [first, child.pid]


async def test_a_child_that_exits_as_fatal_is_not_started_again_and_its_last_words_are_the_error(
    tmp_path: Path,
) -> None:
    async with Supervisor("test-fatal", os.environ) as supervisor:
        child = supervisor.start(program(tmp_path, "print('Model x is broken. Fetch it again.'); exit(78)"))
        with pytest.raises(SetupError, match=r"Model x is broken\. Fetch it again\."):
            await asyncio.wait_for(supervisor.fail(), 10)
        assert child.restarts == 0


async def test_leaving_the_supervisor_ends_children_that_ignore_a_polite_request(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    log = tmp_path / "child.log"
    async with Supervisor("test-stubborn", os.environ) as supervisor:
        child = supervisor.start(
            Program("child", (sys.executable, "-c", stubborn), log, os.environ, stop_timeout_s=0.2)
        )
        await until(lambda: log.exists() and "up" in log.read_text())
        pid = child.pid
        assert pid is not None
    assert not psutil.pid_exists(pid)


GRANDPARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {SLEEPER!r}])
time.sleep(600)
"""
SUPERVISOR = f"""
import asyncio, os, pathlib, sys
from deploy.supervisor import Program, Supervisor

async def main():
    async with Supervisor("test-killed", os.environ) as supervisor:
        argv = (sys.executable, "-c", {GRANDPARENT!r})
        supervisor.start(Program("child", argv, pathlib.Path(sys.argv[1]), supervisor.env))
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_killing_the_supervisor_leaves_no_child_or_grandchild_behind(tmp_path: Path) -> None:
    parent = subprocess.Popen((sys.executable, "-c", SUPERVISOR, str(tmp_path / "child.log")))
    try:
        process = psutil.Process(parent.pid)
        await until(lambda: len(process.children(recursive=True)) == 3)  # guardian, child, grandchild
        members = process.children(recursive=True)
        await until(lambda: all(member.environ().get(MARKER) == "test-killed" for member in members))
        parent.kill()
        _, alive = psutil.wait_procs(members, timeout=15)
        assert alive == []
    finally:
        parent.kill()
        parent.wait()


async def test_a_sweep_ends_processes_seen_before_even_when_their_marker_is_gone() -> None:
    process = subprocess.Popen((sys.executable, "-c", SLEEPER), env={})
    try:
        sweep("test-sweep", [psutil.Process(process.pid)], grace_s=1)
        assert process.wait(5) != 600
    finally:
        process.kill()
        process.wait()
