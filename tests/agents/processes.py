"""The processes around a gateway, as tests start, stop and kill them: a Valkey, a scripted replica, gateway workers."""

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import httpx
import orjson
from redis import Redis

from agents.keys import KEYS
from deploy.store import EmbeddedStore
from onebox.sockets import free_port
from tests.agents.forked import MODULES, Forked
from tests.processes import ROOT

START_TIMEOUT_S = 60
ADMIN_KEY = "test-admin-key"


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Returns once `condition` holds; an HTTP error counts as not yet."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (httpx.HTTPError, KeyError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"the condition did not come true within {timeout_s:g} s")


async def until_async(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Returns once `condition` holds, which other tasks of this loop bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


@dataclass
class Child:
    """A process that can be stopped and started again with the same arguments."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    ready: Callable[[], bool]
    process: "subprocess.Popen[bytes] | Forked | None" = None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        python, *module = self.argv[:3]
        if (python, *module[:1]) == (sys.executable, "-m") and module[1] in MODULES and "--place" not in self.argv:
            self.process = Forked(module[1], self.argv[3:], self.environment, self.log)
        else:
            with self.log.open("ab") as sink:
                self.process = subprocess.Popen(
                    self.argv, cwd=ROOT, env=dict(self.environment), stdout=sink, stderr=subprocess.STDOUT
                )
        try:
            until(self.ready, START_TIMEOUT_S)
        except AssertionError:
            raise AssertionError(f"{self.argv} did not become ready:\n{self.log.read_text()[-3000:]}") from None

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """End it with SIGTERM, and with SIGKILL if that is not enough."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


@dataclass
class Stack:
    """A store, an engine and one gateway worker on free ports."""

    folder: Path
    embedded: EmbeddedStore
    extra: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Describe the processes; nothing is started."""
        self.token = secrets.token_hex(8)
        self.engine_port, self.api_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.api_port}"
        self.engine_url = f"http://127.0.0.1:{self.engine_port}"
        self.headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=30.0, trust_env=False)
        self.engine_client = httpx.Client(
            base_url=self.engine_url, headers={"authorization": f"Bearer {self.token}"}, timeout=5.0, trust_env=False
        )
        own = {
            "home": str(self.folder / "home"),
            "redis_url": self.embedded.url,
            "internal_token": self.token,
            "engine_port": str(self.engine_port),
            "engine_url": self.engine_url,
            "api_port": str(self.api_port),
            "admin_key": ADMIN_KEY,
        } | self.extra
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONEBOX_")}
        inherited["OPENBLAS_NUM_THREADS"] = "1"
        environment = inherited | {f"ONEBOX_{name.upper()}": value for name, value in own.items()}
        self.engine = Child(
            (sys.executable, "-m", "tests.agents.scripted_replica", *self.faults),
            environment,
            self.folder / "engine.log",
            lambda: self.engine_client.get("/readyz").status_code == 200,
        )
        self._environment = environment
        self.gateway = self.worker(self.api_port)

    def worker(self, port: int, **changed: str) -> Child:
        """A gateway worker of this store and engine that listens at `port`, with some settings changed."""
        url = f"http://127.0.0.1:{port}"
        return Child(
            (sys.executable, "-m", "agents"),
            self._environment
            | {f"ONEBOX_{name.upper()}": value for name, value in changed.items()}
            | {"ONEBOX_API_PORT": str(port)},
            self.folder / f"gateway-{port}.log",
            lambda: httpx.get(f"{url}/healthz", timeout=5.0).status_code == 200,
        )

    def replica(self, port: int, **changed: str) -> Child:
        """Another scripted replica, which listens at `port`, with some settings changed."""
        headers = {"authorization": f"Bearer {self.token}"}
        return Child(
            (sys.executable, "-m", "tests.agents.scripted_replica"),
            self._environment
            | {f"ONEBOX_{name.upper()}": value for name, value in changed.items()}
            | {"ONEBOX_ENGINE_PORT": str(port)},
            self.folder / f"replica-{port}.log",
            lambda: httpx.get(f"http://127.0.0.1:{port}/readyz", headers=headers, timeout=5.0).status_code == 200,
        )

    def engine_running(self) -> int:
        """Requests the engine works on."""
        lines = self.engine_client.get("/metrics").text.splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("onebox_engine_running "))))

    def new_key(self, tenant: str) -> str:
        """An API key of a tenant, put into the store as the gateway would."""
        key = f"sk-test-{secrets.token_hex(8)}"
        owner = orjson.dumps({"tenant": tenant, "admin": False, "created": 0})
        with Redis.from_url(self.embedded.url) as redis:
            redis.hset(KEYS, sha256(key.encode()).hexdigest(), owner)
        return key

    def new_conversation(self) -> str:
        """The id of an empty one."""
        return str(self.client.post("/v1/conversations", json={}).json()["id"])

    def variants(self, conversation: str) -> list[dict[str, object]]:
        """The variants of its last turn."""
        turns = self.client.get(f"/v1/conversations/{conversation}").json()["turns"]
        return list(turns[-1]["variants"]) if turns else []


@contextmanager
def run_stack(stack: Stack, *, engine: bool = True) -> Iterator[Stack]:
    """The stack, started; everything is ended on leaving."""
    try:
        if engine:
            stack.engine.start()
        stack.gateway.start()
        yield stack
    finally:
        stack.gateway.stop()
        stack.engine.stop()
        stack.client.close()
        stack.engine_client.close()
