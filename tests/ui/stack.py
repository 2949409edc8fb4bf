"""The page with everything behind it as real processes: Valkey, a scripted engine replica, one gateway, the page."""

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from deploy.store import prepare
from onebox.sockets import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0
KEY = "test-key"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Return as soon as `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain: {what}")
        time.sleep(0.02)


@dataclass
class Stack:
    """Processes by name, and where they listen."""

    home: Path
    settings: dict[str, str]
    api_port: int = field(default_factory=free_port)
    ui_port: int = field(default_factory=free_port)
    engine_port: int = field(default_factory=free_port)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.ui_port}"

    @property
    def engine_url(self) -> str:
        return f"http://127.0.0.1:{self.engine_port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def start(self, name: str, *argv: str, **settings: str) -> None:
        """Start a process with this stack's settings and `settings`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ONEBOX_")}
        own = {f"ONEBOX_{key.upper()}": value for key, value in (self.settings | settings).items()}
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                argv, cwd=ROOT, env=inherited | own, stdout=log, stderr=subprocess.STDOUT
            )

    def end(self, name: str) -> None:
        """End one process and wait for it."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        """End one process without warning."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def start_engine(self, *argv: str, **settings: str) -> None:
        """Start the scripted replica and wait until it answers."""
        self.start("engine", sys.executable, "-m", "tests.agents.scripted_replica", *argv, **settings)
        self.wait_for(f"{self.engine_url}/healthz", "engine")

    def restart_engine(self, *argv: str, **settings: str) -> None:
        """The engine anew with other knobs; returns when the gateway is ready again."""
        if "engine" in self.processes:
            self.end("engine")
        self.start_engine(*argv, **settings)
        self.wait_for(f"{self.api_url}/readyz", "gateway")

    def start_gateway(self) -> None:
        self.start("gateway", sys.executable, "-m", "agents")
        self.wait_for(f"{self.api_url}/healthz", "gateway")

    def start_ui(self) -> None:
        self.start("ui", sys.executable, "-m", "ui")
        self.wait_for(f"{self.ui_url}/healthz", "ui")

    def wait_for(self, url: str, name: str) -> None:
        """Return once `url` answers 200."""

        def answers() -> bool:
            if self.processes[name].poll() is not None:
                raise AssertionError(f"{name} ended: {(self.home / f'{name}.log').read_text()[-3000:]}")
            try:
                headers = {"Authorization": f"Bearer {self.settings['internal_token']}"} if name == "engine" else {}
                return httpx.get(url, headers=headers, timeout=5.0).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, f"{url} ({name})", START_TIMEOUT_S)

    def engine_running(self) -> int:
        """Requests the engine works on now, by its own count."""
        headers = {"Authorization": f"Bearer {self.settings['internal_token']}"}
        text = httpx.get(f"{self.engine_url}/metrics", headers=headers).text
        found = re.search(r"^\S*running\S* ([\d.]+)$", text, re.MULTILINE)
        assert found, text
        return int(float(found[1]))


@contextmanager
def run_stack(home: Path, *, engine: bool = True, gateway: bool = True, **settings: str) -> Iterator[Stack]:
    """All of it, ended on leaving."""
    store = prepare(home / "store")
    stack = Stack(home, {})
    stack.settings = {
        "home": str(home),
        "redis_url": store.url,
        "admin_key": KEY,
        "ui_key": KEY,
        "internal_token": secrets.token_hex(16),
        "api_port": str(stack.api_port),
        "ui_port": str(stack.ui_port),
        "engine": "scripted",
        "engine_port": str(stack.engine_port),
        "engine_url": stack.engine_url,
        "log_level": "info",
        **settings,
    }
    try:
        stack.start("store", *store.argv)
        if engine:
            stack.start_engine()
        if gateway:
            stack.start_gateway()
        stack.start_ui()
        if engine and gateway:
            stack.wait_for(f"{stack.api_url}/readyz", "gateway")
        yield stack
    finally:
        for name in reversed(list(stack.processes)):
            stack.end(name)
