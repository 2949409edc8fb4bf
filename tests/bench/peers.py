"""An environment of their own for the peers, so that their pins never touch ours."""

import subprocess
import sys
from pathlib import Path

PEERS = ("litellm[proxy]==1.108.7", "vllm-router==0.1.17")
FOLDER = Path("~/.cache/onebox-bench/peers").expanduser()


def peer_python() -> Path:
    """The interpreter of the peers' environment, made on first use."""
    python = FOLDER / "bin" / "python"
    if not (FOLDER / "bin" / "litellm").exists():
        subprocess.run((sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, FOLDER), check=True)
        subprocess.run(
            (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *PEERS), check=True
        )
    return python
