"""One scripted engine replica under uvicorn, as a process of its own: `python -m tests.agents.scripted_replica`.

Port and pace come from the settings, the faults from the command line. It is the engine that gateway tests kill.
"""

import argparse
from dataclasses import fields

import uvicorn

from onebox.settings import read_settings
from serving.scripted_engine import Faults, ScriptedEngine
from serving.server import ReplicaApp


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    for fault in fields(Faults):
        parser.add_argument(f"--{fault.name.replace('_', '-')}", type=int)
    faults = Faults(**vars(parser.parse_args()))
    settings = read_settings()
    door = f"http://127.0.0.1:{settings.engine_port}"
    app = ReplicaApp(ScriptedEngine(settings, faults=faults), settings, door)
    uvicorn.run(app, host="127.0.0.1", port=settings.engine_port, loop="uvloop", http="httptools", log_level="warning")


if __name__ == "__main__":
    main()
