"""One scripted engine replica under uvicorn, as a process of its own: `python -m tests.agents.scripted_replica`.

Port and pace come from the settings, faults and a fixed roster from the command line. It is the engine that gateway
tests kill. SIGUSR1 makes it leave its fleet.
"""

import argparse
import signal
from dataclasses import fields, replace

import uvicorn

from onebox.settings import read_settings
from serving.roster import Record
from serving.scripted_engine import Faults, ScriptedEngine
from serving.server import ReplicaApp


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    for fault in fields(Faults):
        parser.add_argument(f"--{fault.name.replace('_', '-')}", type=int)
    parser.add_argument("--door", help="the address it gives for its own, where that is another")
    parser.add_argument("--fleet", nargs="*", default=(), help="the doors in its roster")
    asked = parser.parse_args()
    faults = Faults(**{fault.name: getattr(asked, fault.name) for fault in fields(Faults)})
    settings = read_settings()
    door = asked.door or f"http://127.0.0.1:{settings.engine_port}"

    async def replicas() -> list[Record]:
        return [replace(app.load(), door=door).record() for door in asked.fleet]

    app = ReplicaApp(ScriptedEngine(settings, faults=faults), settings, door, replicas)
    signal.signal(signal.SIGUSR1, lambda *_: app.leave())
    uvicorn.run(
        app.at_door, host="127.0.0.1", port=settings.engine_port, interface="asgi3", loop="uvloop", http="httptools",
        log_level="warning",
    )  # fmt: skip


if __name__ == "__main__":
    main()
