"""The page without coalescing, every frame its own update: what `tests.bench.ui_streams` compares with."""

import uvicorn

from onebox.settings import read_settings
from ui.__main__ import build_app
from ui.stream import Pace

if __name__ == "__main__":
    settings = read_settings()
    uvicorn.run(build_app(settings, Pace(0.0, 0.0)), port=settings.ui_port, log_level="warning")
