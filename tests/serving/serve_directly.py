"""`python -m tests.serving.serve_directly PORT [FAULT TOKEN]`: one replica's ASGI app under uvicorn, without Ray.

Settings come from the environment as everywhere. A fault of the scripted engine (`fail`, `hang`, `crash`) may be set.
"""

import asyncio
import signal
import sys

import uvicorn

from onebox.settings import Settings, read_settings
from serving.engine import Engine
from serving.scripted_engine import Faults, ScriptedEngine
from serving.server import ReplicaApp
from serving.vllm_engine import VllmEngine


async def main() -> None:
    """Serves until a signal comes."""
    settings = read_settings()
    engine = await make_engine(settings)
    port = int(sys.argv[1])
    app = ReplicaApp(engine, settings, f"http://127.0.0.1:{port}")
    # Uvicorn raises the signal again when it has ended, and the engine's processes are still to be ended then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(app, port=port, log_level="warning", loop="uvloop")
    try:
        await uvicorn.Server(config).serve()
    finally:
        await engine.close()


async def make_engine(settings: Settings) -> Engine:
    """The engine of the settings, with the fault of the command line."""
    if settings.engine == "vllm":
        return await VllmEngine.start(settings)
    kind, token = sys.argv[2:4] or ("none", "0")
    at = {kind: int(token)}
    return ScriptedEngine(
        settings,
        faults=Faults(fail_at_token=at.get("fail"), hang_at_token=at.get("hang"), crash_at_token=at.get("crash")),
    )


if __name__ == "__main__":
    asyncio.run(main())
