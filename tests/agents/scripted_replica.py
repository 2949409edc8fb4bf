"""One scripted engine replica under uvicorn, as a process of its own: `python -m tests.agents.scripted_replica`.

Port and pace come from the settings, the faults from the command line. It is the engine that gateway tests kill.
"""

import argparse

import uvicorn

from onebox.settings import read_settings
from serving.scripted_engine import Faults, ScriptedEngine
from serving.server import ReplicaApp


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail-at-token", type=int)
    faults = Faults(fail_at_token=parser.parse_args().fail_at_token)
    settings = read_settings()
    app = ReplicaApp(ScriptedEngine(settings, faults=faults), settings)
    uvicorn.run(app, host="127.0.0.1", port=settings.engine_port, loop="uvloop", http="httptools", log_level="warning")


if __name__ == "__main__":
    main()
