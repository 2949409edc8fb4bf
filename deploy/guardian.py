"""The guardian: a tiny process that outlives a killed supervisor just long enough to clean up after it.

It holds the read end of a pipe whose write end only the supervisor has. When that closes, however the supervisor
ended, every process of the instance is ended: those that carry the instance's marker in their environment, and those
seen before as descendants (Ray and vLLM rewrite their process titles, which can wipe the environment the kernel
shows). It starts nothing and restarts nothing; that is `deploy.supervisor`.
"""

import os
import select
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress

import psutil

MARKER = "ONEBOX_INSTANCE"
LOOK_EVERY_S = 1.0
GRACE_S = 5.0


def marked(instance: str) -> set[psutil.Process]:
    """Processes of this user that were started with the instance's marker."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == instance:
                found.add(process)
    return found


def descendants(pid: int) -> set[psutil.Process]:
    """Children of `pid`, theirs, and so on."""
    with suppress(psutil.Error):
        return set(psutil.Process(pid).children(recursive=True))
    return set()


def end(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """Ask them to terminate; after `grace_s` seconds kill those that are still there."""
    own = os.getpid()
    targets = [process for process in processes if process.pid != own]
    for process in targets:
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(targets, timeout=grace_s)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=2)


def sweep(instance: str, seen: Iterable[psutil.Process], grace_s: float = GRACE_S) -> None:
    """End every process of the instance, and the children those leave behind."""
    first = {process for process in seen if process.is_running()} | marked(instance)
    family = set(first)
    for process in first:
        family |= descendants(process.pid)
    end(family, grace_s)
    end({process for process in marked(instance) if process.pid != os.getpid()}, 0)


def main() -> None:
    """Wait for the supervisor's end; then sweep. Arguments: instance, supervisor's pid; the pipe is stdin."""
    instance, supervisor = sys.argv[1], int(sys.argv[2])
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    seen: set[psutil.Process] = set()
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_EVERY_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
        seen = {process for process in seen | descendants(supervisor) if process.is_running()}
    sweep(instance, seen)


if __name__ == "__main__":
    main()
