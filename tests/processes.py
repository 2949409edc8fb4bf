"""Engine fleets as tests use them: real `python -m deploy.fleet` processes on free ports.

The pytest process itself never imports ray or vllm: their import warnings would be errors here.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from onebox.sockets import free_port

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60


def models_home() -> Path:
    """The `ONEBOX_HOME` that keeps models between runs: `ONEBOX_TEST_HOME` or `~/.cache/onebox-test`."""
    home = Path(os.environ.get("ONEBOX_TEST_HOME", "~/.cache/onebox-test")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return home


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet. `pid` is that of `python -m deploy.fleet`; `model` the name it serves."""

    url: str
    token: str
    pid: int
    model: str
    log: Path

    @property
    def headers(self) -> dict[str, str]:
        """What every request to the fleet wants."""
        return {"authorization": f"Bearer {self.token}"}


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """Settings of a fleet by their names in `onebox.settings`, as the environment gives them."""

    values: dict[str, str] = field(default_factory=dict)

    def environment(self, port: int, token: str) -> dict[str, str]:
        """The process environment: this process's without its settings, plus the fleet's."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONEBOX_")}
        own = self.values | {"engine_port": str(port), "internal_token": token}
        return inherited | {f"ONEBOX_{name.upper()}": value for name, value in own.items()}


@contextmanager
def run_fleet(spec: FleetSpec, log: Path, path: str = "") -> Iterator[Fleet]:
    """A fleet that is ready, ended with everything it started on leaving. `path` leads to one of several models."""
    port, token = free_port(), secrets.token_hex(16)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.fleet"],
            cwd=ROOT,
            env=spec.environment(port, token),
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        model = wait_until_ready(process, f"http://127.0.0.1:{port}{path}", token, log)
        yield Fleet(f"http://127.0.0.1:{port}", token, process.pid, model, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str, token: str, log: Path) -> str:
    """The name of the model, once the engine at `url` draws tokens; fails when the process ends first."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=5.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the fleet exited with {process.returncode}:\n{log.read_text()[-3000:]}")
            try:
                if client.get("/readyz").status_code == 200:
                    return str(client.get("/v1/model").json()["id"])
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
    raise RuntimeError(f"the fleet was not ready within {START_TIMEOUT_S} s:\n{log.read_text()[-3000:]}")
